"""Train and evaluate. `python main.py --help` lists the flags; `config.py` lists every knob.

    python main.py --cfg configs/internimage_b_mimic_cxr_224.yaml --data-path /scratch/mimic
    torchrun --nproc-per-node 4 main.py --cfg ... --data-path ...
    python main.py --cfg ... --data-path ... --eval --resume output/.../best_ckpt.pth

Read `main` at the end first: it leads to `train` and `evaluate`.
"""

import contextlib
import json
import math
import signal
import sys
import time
from pathlib import Path

import torchvision_shim  # noqa: F401

import torch
from timm.utils import ModelEmaV3

import checkpoint
import config as config_module
import distributed
import logger
from analysis import training_log
from analysis.evaluation import new_evaluation, write_evaluation
from analysis.figures import plot_training
from dataset.build import build_dataset, build_loader, worker_count
from dataset.transforms import build_mixup
from errors import UserError
from inference import autocast, compute_threads, progress
from lr_scheduler import build_schedule
from models import build_model
from optimizer import build_optimizer, set_lr
from tasks import build_task


# ------------------------------------------------------------------------------------------ train
def train_epoch(run, epoch, first_update):
    """One epoch from update `first_update` on; returns (sums of the epoch, signal number or 0)."""
    config, world = run.config, run.world
    accumulation = config.TRAIN.ACCUMULATION_STEPS
    sampler = run.train_loader.batch_sampler
    sampler.epoch, sampler.start_batch = epoch, first_update * accumulation
    batches = iter(run.train_loader)
    run.model.train()
    sums, checked = dict(run.sums), first_update
    started, seconds_before = time.time(), sums["seconds"]
    updates = range(first_update, sampler.updates)
    for update in progress(updates, world, desc=f"epoch {epoch + 1}", unit="update"):
        lr = run.schedule(epoch * sampler.updates + update)
        set_lr(run.optimizer, lr)
        for k in range(accumulation):
            images, targets, _ = next(batches)
            sums["skipped"] += config.DATA.BATCH_SIZE - len(images)
            if run.mixup is not None:
                images, targets = run.mixup(images, targets)
            # Gradients cross the network once per update, with the last forward pass.
            silent = world.size > 1 and k < accumulation - 1
            with run.parallel.no_sync() if silent else contextlib.nullcontext():
                with run.amp():
                    loss = run.task.criterion(run.parallel(images).float(), targets)
                run.scaler.scale(loss / accumulation).backward()
            sums["loss"] = sums["loss"] + loss.detach().double() / accumulation
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.TRAIN.CLIP_GRAD or math.inf)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        if run.ema is not None:
            run.ema.update(run.model)
        if run.scaler.is_enabled():  # float16: the scaler skips updates of infinite norm, as it should
            norm = norm.where(norm.isfinite(), 0)
        sums["norm"] = sums["norm"] + norm.double()
        sums["updates"] += 1

        sums["seconds"] = seconds_before + time.time() - started

        last, stopped_by = update == sampler.updates - 1, run.stop.agreed()
        if last or stopped_by or (update + 1) % config.PRINT_FREQ == 0:
            # Summed and looked at here only: reading a GPU value waits for the GPU.
            if not math.isfinite(distributed.mean(sums["loss"].item(), world) + sums["norm"].item()):
                raise UserError(
                    f"the loss or its gradient is not finite (epoch {epoch + 1}, update {checked + 1} to {update + 1});"
                    " earlier checkpoints are intact. Try a smaller TRAIN.BASE_LR, TRAIN.CLIP_GRAD 1, or "
                    "--amp-opt-level O0"
                )
            checked = update + 1
            speed = (update + 1 - first_update) * run.images_per_update / (time.time() - started)
            run.log.info(
                f"epoch {epoch + 1}/{config.TRAIN.EPOCHS} update {update + 1}/{sampler.updates} loss "
                f"{sums['loss'].item() / sums['updates']:.4f} lr {lr:.3e} norm {norm.item():.3f} {speed:.1f} images/s"
            )
        if stopped_by and not last:
            run.save([checkpoint.LAST], epoch, update + 1, sums)
            return sums, stopped_by
    return sums, 0


def zero_sums(device):
    """What an epoch adds up, on the device, so that adding does not wait for it."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return {"loss": zero, "norm": zero, "updates": 0, "skipped": 0, "seconds": 0.0}


class Run:
    """Everything a training run owns; built in the order that its parts need each other."""

    def __init__(self, config, world, folder, log):
        self.config, self.world, self.folder, self.log = config, world, folder, log
        torch.manual_seed(config.SEED)

        # 1. Data first: most mistakes show here, before anything slow.
        train_set, val_set = build_dataset(config, "train"), build_dataset(config, "validate")
        log.info(f"data in {config.DATA.DATA_PATH}\n{train_set.summary}")
        self.train_loader = build_loader(config, train_set, train=True, world=world, log=log)
        self.val_loader = build_loader(config, val_set, train=False, world=world, log=log)
        self.mixup = build_mixup(config)
        self.label_names = train_set.label_names
        self.task = build_task(config, train_set)

        # 2. The model, with foreign weights before anything copies or wraps it.
        self.model = build_model(config)
        if config.MODEL.PRETRAINED:
            checkpoint.load_pretrained(self.model, config.MODEL.PRETRAINED, log)
        self.model.to(world.device)
        self.parallel = self.model
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.parallel = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        self.ema = ModelEmaV3(self.model, decay=config.TRAIN.EMA.DECAY) if config.TRAIN.EMA.ENABLE else None

        if world.device.type == "cpu":
            # Threads that compete with the loading processes wait for each other: two cores are then slower than one.
            torch.set_num_threads(compute_threads(torch.get_num_threads(), worker_count(config)))

        # 3. Optimisation.
        self.amp, dtype = autocast(config, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self.optimizer = build_optimizer(config, self.model)
        updates = self.train_loader.batch_sampler.updates
        self.schedule = build_schedule(config, updates, world.size)
        self.images_per_update = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world.size
        torch.manual_seed(config.SEED + world.rank)  # drop path differs between ranks

        # 4. Where the run stands: at its start, or where a checkpoint left it.
        self.epoch = self.first_update = 0
        self.position = 0, 0  # (epoch, update) of the newest checkpoint
        self.best = self.ema_best = None
        self.sums = zero_sums(world.device)
        self._resume()
        parameters = sum(p.numel() for p in self.model.parameters())
        log.info(
            f"{config.MODEL.TYPE} with {parameters:,} parameters on {world.size} x {world.device.type}, {dtype}; "
            f"{updates} updates of {self.images_per_update} images per epoch, {worker_count(config)} loading processes"
        )
        log.info(
            f"peak learning rate {self.schedule.peak:.3e} = TRAIN.BASE_LR {config.TRAIN.BASE_LR:g} x batch "
            f"{self.images_per_update} / TRAIN.LR_REFERENCE_BATCH {config.TRAIN.LR_REFERENCE_BATCH}"
        )

        if config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.EPOCHS:
            log.warning("TRAIN.WARMUP_EPOCHS is not below TRAIN.EPOCHS: the peak learning rate is never reached")

    def _resume(self):
        config = self.config
        found = checkpoint.find_last(self.folder, self.log) if config.TRAIN.AUTO_RESUME else None
        if found is None and config.MODEL.RESUME:
            found = config.MODEL.RESUME, checkpoint.read(config.MODEL.RESUME)
        if found is None:
            return
        path, state = found
        if config.MODEL.RESUME and Path(config.MODEL.RESUME).absolute() != Path(path).absolute():
            # So that a job submitted with --resume goes on from its own progress when it is requeued.
            self.log.warning(f"{path} is used, not --resume: this run has begun. Use another --tag to begin a new one")
        checkpoint.resume(
            state, path, model=self.model, ema=self.ema, optimizer=self.optimizer, scaler=self.scaler, config=config,
            label_names=self.label_names, world=self.world, log=self.log,
        )  # fmt: skip
        self.epoch, self.first_update = state["epoch"], state["update"]
        self.best, self.ema_best = state["max_accuracy"], state["max_ema_accuracy"]
        if self.first_update:
            # The position counts updates: it means other images if an update takes others now.
            if (state["images_per_update"], len(state["sums"])) != (self.images_per_update, self.world.size):
                self.log.warning(
                    f"{path} was saved within epoch {self.epoch + 1} with {state['images_per_update']} images per "
                    f"update on {len(state['sums'])} processes, other than now: that epoch begins anew"
                )
                self.first_update = 0
            else:
                sums = state["sums"][self.world.rank]
                self.sums = {k: v.to(self.world.device) if torch.is_tensor(v) else v for k, v in sums.items()}
        self.position = self.epoch, self.first_update
        self.log.info(f"resumed from {path}: epoch {self.epoch + 1}, update {self.first_update + 1}")

    def save(self, names, epoch, update, sums=None, weights="model"):
        """Checkpoint under each of `names`; (epoch, update) is where training goes on.

        weights: what a reader of `model` gets: the model's own, or the EMA's ("model_ema").
        """
        # What differs between ranks: random numbers, and the loss summed so far.
        ranks = distributed.gather({"rng": checkpoint.rng_state(self.world), "sums": sums}, self.world)
        if not self.world.is_main:
            return
        state = {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": {"update": epoch * self.train_loader.batch_sampler.updates + update},
            "amp": self.scaler.state_dict(),
            "epoch": epoch,
            "update": update,
            "images_per_update": self.images_per_update,
            "sums": [r["sums"] for r in ranks],
            "max_accuracy": self.best,
            "max_ema_accuracy": self.ema_best,
            "rng": [r["rng"] for r in ranks],
            "weights": weights,
            "label_names": list(self.label_names),
            "config": config_module.to_dict(self.config),
        }
        state["model"] = state[weights]
        checkpoint.save(state, self.folder, names)
        self.position = epoch, update

    def validate(self, model):
        """(score, loss, details) on the validation split, the same on all ranks."""
        distributed.share_buffers(model, self.world)
        return self.task.validate(model, self.val_loader, self.world, self.amp)

    def finish_epoch(self, epoch, sums):
        """Validate, write the log lines and every checkpoint that is due after `epoch`."""
        config, task = self.config, self.task
        score, loss, details = self.validate(self.model)
        is_best = score is not None and (self.best is None or score > self.best)
        self.best = score if is_best else self.best
        record = {
            "epoch": epoch + 1,
            "train_loss": distributed.mean(sums["loss"].item(), self.world) / sums["updates"],
            "lr": self.schedule((epoch + 1) * self.train_loader.batch_sampler.updates - 1),
            "grad_norm": sums["norm"].item() / sums["updates"],
            "val_loss": loss,
            task.score: score,
            "auc" if task.score == "mean_auc" else "details": details,
            f"best_{task.score}": self.best,
        }
        is_ema_best = False
        if self.ema is not None:
            ema_score, ema_loss, ema_details = self.validate(self.ema.module)
            is_ema_best = ema_score is not None and (self.ema_best is None or ema_score > self.ema_best)
            self.ema_best = ema_score if is_ema_best else self.ema_best
            record["ema"] = {"val_loss": ema_loss, task.score: ema_score, "auc": ema_details, "best": self.ema_best}
        images = self.images_per_update * sums["updates"]
        record["skipped"] = sum(distributed.gather(sums["skipped"], self.world))
        record |= {"seconds": round(sums["seconds"], 1), "images_per_s": round(images / sums["seconds"], 1)}

        # The log first, the checkpoint after: a resume drops lines behind its epoch, and none is missing.
        if self.world.is_main:
            training_log.append_metrics(self.folder / "metrics.jsonl", record)
        self.log.info(training_log.epoch_lines(record, task.score))
        # LAST comes last: killed before it, the run repeats this epoch and writes the others again.
        done = epoch + 1
        names = [checkpoint.BEST] if is_best else []
        if done % config.SAVE_FREQ == 0 or done == config.TRAIN.EPOCHS:
            names.append(f"ckpt_epoch_{done}.pth")
        if is_ema_best:
            self.save([checkpoint.EMA_BEST], done, 0, weights="model_ema")
        self.save([*names, checkpoint.LAST], done, 0)


def train(config, world, folder, log):
    """Train to the last epoch; returns 0, or the number of the signal that stopped it."""
    with distributed.StopRequest(world) as stop, distributed.only_run_in(folder, world):
        run = Run(config, world, folder, log)
        run.stop = stop
        if world.is_main:
            (folder / "config.json").write_text(json.dumps(config_module.to_dict(config), indent=2) + "\n")
        if run.epoch >= config.TRAIN.EPOCHS:
            log.info(f"already finished: {run.epoch} of TRAIN.EPOCHS {config.TRAIN.EPOCHS} epochs are done")
            distributed.report_outcome(world, "finished")
            return 0
        for epoch in range(run.epoch, config.TRAIN.EPOCHS):
            sums, number = train_epoch(run, epoch, run.first_update)
            if not number:
                run.finish_epoch(epoch, sums)
                run.first_update, run.sums = 0, zero_sums(world.device)
                number = stop.agreed() if epoch + 1 < config.TRAIN.EPOCHS else 0
            if number:
                log.info(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
                # A job script reads the file and requeues; to a shell the exit status says it.
                asked = distributed.report_outcome(world, "interrupted {} {}".format(*run.position))
                return 0 if asked else number
    if world.is_main:
        plot_training(folder, run.task.score)
    if run.best is None:
        log.warning(
            "no label has both classes in the validation split, so there is no best checkpoint; "
            f"evaluate the last one with --eval --resume {folder / checkpoint.LAST}"
        )
    distributed.report_outcome(world, "finished")
    log.info(f"finished: best {run.task.score} on the validation split {run.best}; everything is in {folder}")
    return 0


# --------------------------------------------------------------------------------------- evaluate
def evaluate(config, world, folder, log):
    """Evaluate a checkpoint on the test split into RESULTS/evaluation_<timestamp>; returns its folder."""
    dataset = build_dataset(config, "test")
    log.info(f"data in {config.DATA.DATA_PATH}\n{dataset.summary}")
    loader = build_loader(config, dataset, train=False, world=world, log=log)
    task, model = build_task(config, dataset), build_model(config)
    # The run's best comes before PRETRAINED: a training command with --eval added tests what it trained.
    path = Path(config.MODEL.RESUME or folder / (checkpoint.EMA_BEST if config.TEST.EMA else checkpoint.BEST))
    if not config.MODEL.RESUME and config.MODEL.PRETRAINED and not path.exists():
        path = config.MODEL.PRETRAINED
        keys = checkpoint.load_pretrained(model, path, log)
        if keys["replaced"] or keys["missing"]:
            raise UserError(f"--eval: {path} has no head for these {config.MODEL.NUM_CLASSES} classes; train first")
    else:
        state = checkpoint.read(path)
        checkpoint.load_weights(model, state, path, dataset.label_names)
        checkpoint.log_differences(
            state, config, log, but=("EVAL_MODE", "MODEL.RESUME", "MODEL.PRETRAINED", "RESULTS", "TEST.EMA")
        )
    target = new_evaluation(config.RESULTS) if world.is_main else None
    log.info(f"evaluating {path} on {len(dataset):,} test images")
    metrics = task.test(model.to(world.device), loader, world, autocast(config, world.device)[0])
    if not world.is_main:
        return None
    skipped = len(dataset) - metrics["images"]
    metrics = {"checkpoint": str(path), "config": config_module.to_dict(config), "skipped": skipped} | metrics
    write_evaluation(target, metrics, dataset)
    log.info("test split\n" + task.table(metrics))
    if skipped:
        log.warning(f"{skipped} of {len(dataset):,} test images could not be read and do not count")
    log.info(f"results in {target}")
    return target


def measure_throughput(config, world, log):
    """Images/s of the forward pass on random images: median of 10 batches after 3 to warm up."""
    model = build_model(config).to(world.device).eval()
    amp, dtype = autocast(config, world.device)
    images = torch.randn(config.DATA.BATCH_SIZE, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE, device=world.device)
    seconds = []
    with torch.no_grad():
        for _ in range(13):
            started = time.time()
            with amp():
                model(images)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.time() - started)
    median = sorted(seconds[3:])[5]
    log.info(f"forward pass: {len(images) / median:.1f} images/s (batch {len(images)}, {dtype}, {world.device})")


# ------------------------------------------------------------------------------------------ entry
def main(argv=None):
    """Run one command line; returns 0, or the number of the signal that stopped training."""
    config = config_module.get_config(config_module.parse_args(argv))
    with distributed.session() as world:
        folder = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
        try:
            folder.mkdir(parents=True, exist_ok=True)
            log = logger.build_logger(folder, world.rank)
        except OSError as error:
            raise UserError(
                f"output folder {folder} cannot be written ({error.strerror}); choose another --output"
            ) from error
        try:
            if config.THROUGHPUT_MODE:
                measure_throughput(config, world, log)
                return 0
            if config.EVAL_MODE:
                evaluate(config, world, folder, log)
                return 0
            return train(config, world, folder, log)
        except UserError as error:
            logger.to_file(log, f"error: {error}")  # the terminal gets it from `run_command`
            raise
        except RuntimeError as error:
            if distributed.is_loss_of_peer(error):  # `session` says it on the terminal
                logger.to_file(log, f"error: {distributed.LOSS_OF_PEER}")
            raise
        finally:
            logger.close(log)


def run_command(function, argv=None):
    """Run an entry point: a user's mistake becomes one line on stderr and exit status 2."""
    try:
        stopped_by = function(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(128 + stopped_by if stopped_by else 0)


if __name__ == "__main__":
    run_command(main)
