"""Train and evaluate. `python main.py --help` lists the flags; `config.py` lists every knob.

    python main.py --cfg configs/internimage_b_mimic_cxr_224.yaml --data-path /scratch/mimic
    torchrun --nproc-per-node 4 main.py --cfg ... --data-path ...
    python main.py --cfg ... --data-path ... --eval --resume output/.../best_ckpt.pth

Read `main` at the end first: it leads to `train` and `evaluate`.
"""

import contextlib
import json
import math
import os
import signal
import time
import traceback
from pathlib import Path

import common.torchvision_shim  # noqa: F401

import torch
from timm.utils import ModelEmaV3

import config as config_module
from analysis import training_log
from analysis.evaluation import TEST, VALIDATE, digest, new_evaluation, read_evaluation, write_evaluation
from analysis.figures import plot_training
from analysis.metrics import Best
from analysis.results import Options
from analysis.writing import write_report
from common import logger
from common.errors import UserError, run_command
from dataset.build import build_datasets, build_loader, fingerprint, worker_count
from dataset.files.domain import domain_warning
from dataset.mixing import build_mixing
from dataset.patients import patients_of, refuse_known, together
from dataset.sources import parts_of
from dataset.tables import EmptySplit
from models import build_model, own_values, pretrained_file
from models.cost import count_gmacs
from training import checkpoint, compiling, distributed, faults, throughput
from training.inference import autocast, compute_threads, device_name, peak_memory, progress, set_up_device
from training.lr_scheduler import build_schedule
from training.optimizer import build_optimizer, set_lr
from training.tasks import TASKS


# ------------------------------------------------------------------------------------------ train
def train_epoch(run, epoch, first_update):
    """One epoch from update `first_update` on; returns (sums of the epoch, signal number or 0)."""
    batches = run.batches(epoch, first_update)
    run.model.train()
    sums, checked = dict(run.sums), first_update
    started, seconds_before = time.time(), sums["seconds"]
    told, waited_before = started, sums["waited"]  # of the last line of the log
    for update in progress(range(first_update, run.updates), run.world, desc=f"epoch {epoch + 1}", unit="update"):
        lr = run.schedule(epoch * run.updates + update)
        run.update(batches, lr, sums)
        now = time.time()
        sums["seconds"] = seconds_before + now - started
        run.say_compiled(now - started)
        last, stopped_by = update == run.updates - 1, run.stop.agreed()
        if last or stopped_by or (update + 1) % run.config.PRINT_FREQ == 0:
            # Looked at here only: reading a GPU value waits for the GPU.
            run.check_finite(sums, f"epoch {epoch + 1}, update {checked + 1} to {update + 1}")
            checked = update + 1
            now = time.time()
            speed = (update + 1 - first_update) * run.images_per_update / (now - started)
            waited = (sums["waited"] - waited_before) / (now - told)
            told, waited_before, memory = now, sums["waited"], peak_memory(run.world.device)
            run.log.info(
                f"epoch {epoch + 1}/{run.config.TRAIN.EPOCHS} update {update + 1}/{run.updates} loss "
                f"{sums['loss'].item() / sums['updates']:.4f} lr {lr:.3e} norm {sums['last_norm'].item():.3f} "
                f"{speed:.1f} images/s, {waited:.0%} waiting for data, peak memory {memory:.2f} GB"
            )
        if stopped_by and not last:
            run.save([checkpoint.LAST], epoch, update + 1, sums)
            return sums, stopped_by
    return sums, 0


def zero_sums(device):
    """What an epoch adds up, on the device, so that adding does not wait for it."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = {"loss": zero, "norm": zero, "last_norm": zero, "updates": 0, "skipped": 0}
    return sums | {"seconds": 0.0, "waited": 0.0}  # the second is a part of the first


class Run:
    """Everything a training run owns; built in the order that its parts need each other."""

    def __init__(self, config, world, folder, log, stop):
        self.config, self.world, self.folder, self.log, self.stop = config, world, folder, log, stop
        self.board, self.last_images = None, None
        if config.LOG.TENSORBOARD and world.is_main:
            from analysis import tensorboard

            self.board = tensorboard.open_board(folder)
        torch.manual_seed(config.SEED)
        self._build_data()  # 1. first, since most mistakes show here, before anything slow
        found = self._find_checkpoint()  # 2. before the model, which then needs no foreign weights
        self._build_model(pretrained="" if found else pretrained_file(config))  # 3.
        self._build_optimisation()  # 4. over the parameters as they lie on the device
        torch.manual_seed(config.SEED + world.rank)  # drop path differs between ranks
        self._begin()  # 5. at the start,
        if found:
            self._go_on(*found)  # or where a checkpoint left the run
        self._say_what_begins()

    def _build_data(self):
        config, log = self.config, self.log
        train_set, val_set = build_datasets(config, "train", "validate")
        log_datasets(log, config, train_set, val_set)
        self.train_loader = build_loader(config, train_set, train=True, world=self.world, log=log)
        self.val_loader = build_loader(config, val_set, train=False, world=self.world, log=log)
        self.updates = self.train_loader.batch_sampler.updates
        self.images_per_update = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * self.world.size
        sampler = self.train_loader.batch_sampler
        self.data = {"train": fingerprint(train_set, sampler), "validate": fingerprint(val_set)}
        self.mix = build_mixing(config)
        self.label_names, self.task = train_set.label_names, TASKS[train_set.task]
        self.criterion = self.task.build_criterion(config, train_set.targets, sampler.expected, self.world.device)
        self.metric = self.task.best_metric(config.TRAIN.BEST_BY)
        self.train_set, self.domain = train_set, getattr(train_set, "domain", "")
        self.val_sources = getattr(val_set, "sources", None)
        self.patients = together(patients_of(train_set, config), patients_of(val_set, config))

    def _find_checkpoint(self):
        """(path, content) of the checkpoint to go on from, or None."""
        config = self.config
        if not config.TRAIN.AUTO_RESUME:
            checkpoint.refuse_to_overwrite(self.folder)
        found = checkpoint.find_last(self.folder, self.log) if config.TRAIN.AUTO_RESUME else None
        if found is None:
            return (config.MODEL.RESUME, checkpoint.read(config.MODEL.RESUME)) if config.MODEL.RESUME else None
        if config.MODEL.RESUME and Path(config.MODEL.RESUME).absolute() != Path(found[0]).absolute():
            # So that a job submitted with --resume goes on from its own progress when it is requeued.
            self.log.warning(
                f"{found[0]} is used, not --resume: this run has begun. Use another --tag to begin a new one"
            )
        return found

    def _build_model(self, pretrained):
        config, world = self.config, self.world
        self.model = build_model(config)
        log_without_effect(self.log, config, self.train_set, self.model, world.device)
        if pretrained:  # before anything copies or wraps the model
            keys = checkpoint.load_pretrained(self.model, pretrained, self.log)
            self.patients = together(self.patients, keys["patients"])
        self.model.to(world.device)
        # What trains: validation, the average and checkpoints take the model itself, whose parameters these are.
        self.trained, self.to_compile = self.model, config.TRAIN.COMPILE
        if config.TRAIN.COMPILE:
            self.trained = compiling.compile_model(self.model)
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.trained = torch.nn.parallel.DistributedDataParallel(self.trained, device_ids=ids)
        self.ema = ModelEmaV3(self.model, decay=config.TRAIN.EMA.DECAY) if config.TRAIN.EMA.ENABLE else None

    def _build_optimisation(self):
        config, world = self.config, self.world
        limit_threads(config, world)
        self.amp, self.dtype = autocast(config, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self.optimizer = build_optimizer(config, self.model, self.criterion)
        self.schedule = build_schedule(config, self.updates, world.size)

    def _begin(self):
        self.epoch = self.first_update = 0
        self.position = 0, 0  # (epoch, update) of the newest checkpoint
        self.best, self.ema_best = Best(self.metric), Best(self.metric)
        self.sums = zero_sums(self.world.device)

    def _go_on(self, path, state):
        checkpoint.resume(
            state, path, model=self.model, criterion=self.criterion, ema=self.ema, optimizer=self.optimizer,
            scaler=self.scaler, config=self.config, label_names=self.label_names, world=self.world, log=self.log,
        )  # fmt: skip
        self.epoch, self.first_update = state["epoch"], state["update"]
        self.patients = together(self.patients, state.get("patients", {}))
        if warning := domain_warning(state.get("domain"), self.domain):
            self.log.warning(warning)
        saved = state.get("data", self.data)
        best_by = state.get("best_by", self.task.best_metric(config_module.KNOBS["TRAIN.BEST_BY"].default).key)
        if best_by != self.metric.key:
            self.log.warning(
                f"{path} chose its best checkpoint by {best_by} ({state['max_accuracy']}), now TRAIN.BEST_BY is "
                f"{self.metric.key}: the best checkpoint restarts"
            )
        elif saved["validate"] == self.data["validate"]:
            self.best.value, self.ema_best.value = state["max_accuracy"], state["max_ema_accuracy"]
        else:
            self.log.warning(
                f"{path} was validated on other images or labels than now: scores before and after cannot be "
                f"compared, so the best checkpoint begins anew (before: {state['max_accuracy']})"
            )
        if self.first_update:
            # The position counts updates: it means other images if an update takes others now.
            other = "other training images" if saved["train"] != self.data["train"] else None
            if (state["images_per_update"], len(state["sums"])) != (self.images_per_update, self.world.size):
                other = f"{state['images_per_update']} images per update on {len(state['sums'])} processes"
            if other:
                self.log.warning(
                    f"{path} was saved within epoch {self.epoch + 1} with {other}, not those of now: "
                    "that epoch begins anew"
                )
                self.first_update = 0
            else:
                sums = state["sums"][self.world.rank]
                self.sums |= {k: v.to(self.world.device) if torch.is_tensor(v) else v for k, v in sums.items()}
        self.position = self.epoch, self.first_update
        self.log.info(f"resumed from {path}: epoch {self.epoch + 1}, update {self.first_update + 1}")

    def _say_what_begins(self):
        config, log = self.config, self.log
        slow = config.AMP_OPT_LEVEL == "O1" and self.dtype == torch.float32
        slow = " (AMP_DTYPE auto: this CPU has no units for bfloat16)" if slow else ""
        log.info(
            f"{config.MODEL.TYPE} with {sum(p.numel() for p in self.model.parameters()):,} parameters on "
            f"{self.world.size} x {self.world.device.type}, {self.dtype}{slow}; {self.updates} updates of "
            f"{self.images_per_update} images per epoch, {worker_count(config)} loading processes"
        )
        log.info(
            f"peak learning rate {self.schedule.peak:.3e} = TRAIN.BASE_LR {config.TRAIN.BASE_LR:g} x batch "
            f"{self.images_per_update} / TRAIN.LR_REFERENCE_BATCH {config.TRAIN.LR_REFERENCE_BATCH}"
        )
        log.info(f"the best checkpoint is chosen by {self.metric.key}, {self.metric.direction} (TRAIN.BEST_BY)")
        if config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.EPOCHS:
            log.warning("TRAIN.WARMUP_EPOCHS is not below TRAIN.EPOCHS: the peak learning rate is never reached")

    def batches(self, epoch, first_update):
        """Iterator over the batches of an epoch from an update on."""
        sampler = self.train_loader.batch_sampler
        self.criterion.set_epoch(epoch)
        self.mix.epoch = epoch
        sampler.epoch, sampler.start_batch = epoch, first_update * self.config.TRAIN.ACCUMULATION_STEPS
        return iter(self.train_loader)

    def update(self, batches, lr, sums):
        """One step of the optimizer at rate `lr`, over the next batches; adds what is logged of it to `sums`."""
        accumulation = self.config.TRAIN.ACCUMULATION_STEPS
        set_lr(self.optimizer, lr)
        total, known = 0.0, 0.0  # of the update: its loss, and the share of its labels that are known
        for k in range(accumulation):
            asked = time.time()
            images, targets, rows = next(batches)
            sums["waited"] += time.time() - asked
            sums["skipped"] += self.config.DATA.BATCH_SIZE - int((rows >= 0).sum())
            small = len(images) < self.config.DATA.BATCH_SIZE  # to compile for each such size would take minutes
            images, targets = self.mix(images, targets)
            self.last_images = images
            share = self.task.known(targets, self.config.DATA.BATCH_SIZE)
            # Gradients cross the network once per update, with the last forward pass.
            silent = self.world.size > 1 and k < accumulation - 1
            with self.trained.no_sync() if silent else contextlib.nullcontext():
                with self.amp(), compiling.uncompiled(self.config.TRAIN.COMPILE and small):
                    loss = self.criterion(self.trained(images), targets)
                self.scaler.scale(loss * share / accumulation).backward()
            total, known = total + loss.detach().double() * share / accumulation, known + share
        distributed.average_gradients(self.criterion.parameters(), self.world)
        self.scaler.unscale_(self.optimizer)
        # The mean over the known labels of the whole update: all its batches on all ranks.
        whole = 1 / distributed.mean_tensor(known / accumulation, self.world).clamp(min=1e-12)
        parameters = [*self.model.parameters(), *self.criterion.parameters()]
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], whole)
        sums["loss"] = sums["loss"] + total * whole
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.TRAIN.CLIP_GRAD or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        if self.scaler.is_enabled():  # float16: the scaler skips updates of infinite norm, as it should
            norm = norm.where(norm.isfinite(), 0)
        sums["norm"], sums["last_norm"] = sums["norm"] + norm.double(), norm.double()
        sums["updates"] += 1

    def say_compiled(self, seconds):
        """After the first update: how long it took, if it compiled the model."""
        if self.to_compile:
            self.log.info(
                f"the first update took {seconds:.0f} s: it compiled the model; what it made is kept in "
                f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}"
            )
        self.to_compile = False

    def check_finite(self, sums, where):
        """A UserError if the loss or the gradient's norm has been infinite or NaN on any rank."""
        if not math.isfinite(distributed.mean(sums["loss"].item(), self.world) + sums["norm"].item()):
            raise UserError(
                f"the loss or its gradient is not finite ({where}); earlier checkpoints are intact. Try a smaller "
                "TRAIN.BASE_LR, TRAIN.CLIP_GRAD 1, or --amp-opt-level O0"
            )

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
            "lr_scheduler": {"update": epoch * self.updates + update},
            "amp": self.scaler.state_dict(),
            "epoch": epoch,
            "update": update,
            "images_per_update": self.images_per_update,
            "sums": [r["sums"] for r in ranks],
            "loss": {self.criterion.name: self.criterion.state_dict()},
            # The best score by TRAIN.BEST_BY.
            "best_by": self.metric.key,
            "max_accuracy": self.best.value,
            "max_ema_accuracy": self.ema_best.value,
            "rng": [r["rng"] for r in ranks],
            "weights": weights,
            "label_names": list(self.label_names),
            "data": self.data,
            "domain": self.domain,
            "patients": self.patients,
            "config": config_module.to_dict(self.config),
        }
        state["model"] = state[weights]
        checkpoint.save(state, self.folder, names)
        self.position = epoch, update

    def validate(self, model, best):
        """(what metrics.jsonl has of `model` on the validation split, the same on all ranks; is it a new best?)"""
        distributed.share_buffers(model, self.world)
        found = self.task.validate(
            model, self.val_loader, self.world, self.amp, label_names=self.label_names, metric=self.metric,
            sources=self.val_sources,
        )  # fmt: skip
        is_best = best.is_beaten_by(found.score)
        best.value = found.score if is_best else best.value
        return found.record, is_best

    def finish_epoch(self, epoch, sums):
        """Validate, write the log lines and every checkpoint that is due after `epoch`."""
        done, is_ema_best = epoch + 1, False
        validated, is_best = self.validate(self.model, self.best)
        record = {
            "epoch": done,
            "train_loss": distributed.mean(sums["loss"].item(), self.world) / sums["updates"],
            "lr": self.schedule(done * self.updates - 1),
            "grad_norm": sums["norm"].item() / sums["updates"],
            **validated,
            f"best_{self.metric.key}": self.best.value,
        }
        if self.ema is not None:
            validated, is_ema_best = self.validate(self.ema.module, self.ema_best)
            record["ema"] = {**validated, "best": self.ema_best.value}
        images, waited = self.images_per_update * sums["updates"], distributed.gather(sums["waited"], self.world)
        record["skipped"] = sum(distributed.gather(sums["skipped"], self.world))
        record |= {"seconds": round(sums["seconds"], 1), "images_per_s": round(images / sums["seconds"], 1)}
        # The others wait, for its gradients, for the one that waits longest.
        record |= {"waited": round(max(waited) / sums["seconds"], 3)}
        record |= {"peak_memory_gb": round(max(distributed.gather(peak_memory(self.world.device), self.world)), 2)}

        # The log before the checkpoint: a resume from it rewrites the lines of later epochs, so none is ever missing.
        if self.world.is_main:
            training_log.append_metrics(self.folder / "metrics.jsonl", record)
        if self.board is not None:
            from analysis import tensorboard

            tensorboard.write_epoch(self.board, record, self.last_images, self.config.AUG.MEAN, self.config.AUG.STD)
        self.log.info(training_log.epoch_lines(record, self.metric))
        # LAST comes last: killed before it, the run repeats this epoch and writes the others again.
        names = [checkpoint.BEST] if is_best else []
        if done % self.config.SAVE_FREQ == 0 or done == self.config.TRAIN.EPOCHS:
            names.append(f"ckpt_epoch_{done}.pth")
        if is_ema_best:
            self.save([checkpoint.EMA_BEST], done, 0, weights="model_ema")
        self.save([*names, checkpoint.LAST], done, 0)


def train(config, world, folder, log):
    """Train to the last epoch; returns 0, or the number of the signal that stopped it."""
    with distributed.StopRequest(world) as stop, distributed.only_run_in(folder, world):
        run = Run(config, world, folder, log, stop)
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
        plot_training(folder, run.task.metrics())
    if run.best.value is None:
        log.warning(
            "no label has both classes in the validation split, so there is no best checkpoint; "
            f"evaluate the last one with --eval --resume {folder / checkpoint.LAST}"
        )
    distributed.report_outcome(world, "finished")
    log.info(f"finished: best {run.metric.key} on the validation split {run.best.value}; everything is in {folder}")
    return 0


def limit_threads(config, world):
    """On a CPU, computing threads that compete with the loading processes wait for each other: slower than fewer."""
    if world.device.type == "cpu":
        torch.set_num_threads(compute_threads(torch.get_num_threads(), worker_count(config)))


def log_datasets(log, config, *datasets):
    """What is read, and what its reader warns of."""
    folders = ", ".join(one.DATA.DATA_PATH for one in config_module.source_configs(config).values())
    log.info(f"data in {folders}\n{datasets[0].summary}")
    for warning in dict.fromkeys(text for dataset in datasets for text in dataset.warnings):
        log.warning(warning)


def log_without_effect(log, config, dataset, model, device):
    """Warn of the options that are set and do nothing for this data, any of its sources, this model and this device."""
    if config.DATA.SOURCES and config.DATA.DATA_PATH:
        log.warning(f"DATA.DATA_PATH {config.DATA.DATA_PATH!r} has no effect: DATA.SOURCES names the folders")
    by_source = [
        config_module.without_effect(one, part.task, model.uses | getattr(part, "uses", frozenset()), device.type)
        for one, part in parts_of(dataset, config).values()
    ]
    for line in by_source[0]:
        key = line.split()[0]
        if all(any(other.split()[0] == key for other in lines) for lines in by_source):
            log.warning(line)


# --------------------------------------------------------------------------------------- evaluate
def load_for_evaluation(model, config, folder, dataset, log):
    """Put the weights to evaluate on `dataset` into `model`: those of --resume, the run's best, or --pretrained.

    Returns (their file, domain, patients and weights as the checkpoint has them; {} where it does not).
    """
    # The run's best comes before PRETRAINED: a training command with --eval added tests what it trained.
    path = Path(config.MODEL.RESUME or folder / (checkpoint.EMA_BEST if config.TEST.EMA else checkpoint.BEST))
    if not config.MODEL.RESUME and config.MODEL.PRETRAINED and not path.exists():
        path = config.MODEL.PRETRAINED
        keys = checkpoint.load_pretrained(model, path, log)
        if keys["replaced"] or keys["missing"]:
            raise UserError(f"--eval: {path} has no head for these {config.MODEL.NUM_CLASSES} classes; train first")
        refuse_known(keys["patients"], dataset, config, path)
        return path, {}
    state = checkpoint.read(path)
    checkpoint.load_weights(model, state, path, dataset.label_names, averaged=config.TEST.EMA)
    refuse_known(state.get("patients", {}), dataset, config, path)
    of_evaluation = ("EVAL_MODE", "MODEL.RESUME", "MODEL.PRETRAINED", "RESULTS", "TEST.EMA")
    checkpoint.log_differences(state, config, log, but=of_evaluation)
    return path, {key: state[key] for key in ("domain", "patients", "weights") if key in state}


def build_evaluation_sets(config, log):
    """(test split, validation split or None where there is none): thresholds are chosen on the second alone."""
    try:
        test_set, held_out = build_datasets(config, "test", "validate")
    except EmptySplit as error:
        (test_set,) = build_datasets(config, "test")  # if this is the empty split, that is an error
        log.warning(f"no thresholds and no scaling of probabilities, for want of a validation split: {error}")
        return test_set, None
    return test_set, held_out if TASKS[test_set.task].report else None


def evaluate(config, world, folder, log):
    """Evaluate a checkpoint into RESULTS/evaluation_<timestamp>, with its report; returns the folder.

    The figures are those of the test split, which is read here and nowhere else.
    """
    dataset, held_out = build_evaluation_sets(config, log)
    log_datasets(log, config, dataset)
    task, model = TASKS[dataset.task], build_model(config)
    log_without_effect(log, config, dataset, model, world.device)
    path, training = load_for_evaluation(model, config, folder, dataset, log)
    trained_on, domain = training.get("domain", ""), getattr(dataset, "domain", "")
    warnings = [text for text in [domain_warning(trained_on, domain)] if text]
    for text in warnings:
        log.warning(text)
    target = new_evaluation(config.RESULTS) if world.is_main else None
    model, (amp, dtype) = model.to(world.device), autocast(config, world.device)
    limit_threads(config, world)

    def test(split):
        loader = build_loader(config, split, train=False, world=world, log=log)
        sources = getattr(split, "sources", None)
        return split, task.test(model, loader, world, amp, label_names=split.label_names, sources=sources)

    log.info(f"evaluating {path} on {len(dataset):,} test images")
    started = time.time()
    predicted = {TEST: test(dataset)}
    seconds = time.time() - started
    if held_out is not None:
        log.info(f"thresholds and calibration: {len(held_out):,} validation images")
        predicted[VALIDATE] = test(held_out)
    if not world.is_main:
        return None
    metrics = {k: v for k, v in predicted[TEST][1].items() if k not in ("probabilities", "targets", "rows")}
    skipped = len(dataset) - metrics["images"]
    processors = device_name(world.device) if world.size == 1 else f"{world.size} x {device_name(world.device)}"
    about = {
        "dataset": config_module.data_name(config),
        "root": str(getattr(dataset, "root", config.DATA.DATA_PATH)),
        "tested_on": sorted({one.DATA.DATASET for one in config_module.source_configs(config).values()}),
        "trained_on": sorted(training.get("patients", {})),
        "checkpoint": str(path),
        "checkpoint_sha256": digest(path),
        "ema": None if training.get("weights") == "model_ema" else config.TEST.EMA,  # None: it has no other
        "backbone": config_module.backbone_name(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmacs": round(count_gmacs(model, config.DATA.IMG_SIZE), 3),
        "images_per_s": round(metrics["images"] / seconds, 1),
        "device": f"{processors}, {dtype}, batch {config.DATA.BATCH_SIZE}",
        "domain": {"trained": trained_on, "tested": domain},
        "warnings": warnings,
        "config": config_module.to_dict(config),
        "skipped": skipped,
    }
    if task.report:
        about["label_policy"] = {"uncertain": config.DATA.UNCERTAIN, "missing": config.DATA.MISSING}
        about["label_mapping"] = getattr(dataset, "label_mapping", {})
        about["cohort"] = getattr(dataset, "cohort", {})
    write_evaluation(target, about | metrics, predicted, Path(path).parent / "metrics.jsonl")
    log.info("test split\n" + task.table(metrics))
    if skipped:
        log.warning(f"{skipped} of {len(dataset):,} test images could not be read and do not count")
    log.info(f"results in {target}")
    if task.report and config.TEST.REPORT:
        log.info(write_report(read_evaluation(target), Options(), target)["headline"])
        log.info(f"report in {target / 'report.html'}")
    return target


def measure_throughput(config, world, log):
    """The training step of this configuration, and its parts: on random images, and on those of DATA_PATH, if given."""
    torch.manual_seed(config.SEED)
    loader = None
    if config.DATA.DATA_PATH or config.DATA.SOURCES:
        (dataset,) = build_datasets(config, "train")
        loader = build_loader(config, dataset, train=True, world=world, log=log)
        limit_threads(config, world)
    step = throughput.Step(config, world.device)
    product = throughput.Product(world.device, step.dtype)
    seconds, of_product = throughput.step_seconds({"step": step, "product": product}, rounds=10).values()
    rate, matrices = len(step.images) / sum(seconds), product.rate(*of_product)
    parts = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in zip(throughput.PARTS, seconds))
    log.info(
        f"training step: {rate:.1f} images/s (batch {len(step.images)}, {step.dtype}, {world.device}), ms: {parts}; "
        f"peak memory {peak_memory(world.device):.2f} GB\n{step.gmacs:.3f} GMACs an image: "
        f"{throughput.share_of(matrices, step.gmacs, rate):.0%} of the rate of matrix products, "
        f"{matrices / 1e12:.3f} TFLOP/s on {device_name(world.device)}"
    )
    if loader is not None:
        # Until what the loading processes hold ready is used up.
        warm_up = 2 * worker_count(config) + 2
        batches = min(len(loader) - warm_up, 100 if world.device.type == "cuda" else 10)
        if batches < 1:
            log.warning(f"{len(loader)} batches of images are too few to measure loading by")
            return
        fed, waited = throughput.fed_rate(step, loader, batches, warm_up)
        minutes = config.TRAIN.EPOCHS * len(dataset) / (60 * fed * world.size)
        log.info(
            f"fed by the loader: {fed:.1f} images/s, {fed / rate:.0%} of that; {waited:.0%} waiting for data\n"
            f"TRAIN.EPOCHS {config.TRAIN.EPOCHS} of {len(dataset):,} images: about {minutes:,.0f} minutes"
        )


# ------------------------------------------------------------------------------------------ entry
def open_run(config, world):
    """(folder of the run, its log); an evaluation needs a run that is there, or a checkpoint named by a flag."""
    folder = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
    if config.EVAL_MODE and not (config.MODEL.RESUME or config.MODEL.PRETRAINED or folder.is_dir()):
        tags = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
        there = f"--tag can be {', '.join(tags)}" if tags else "there is no run beside it, see --output"
        raise UserError(f"--eval: {folder / checkpoint.BEST} does not exist; {there}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder, logger.build_logger(folder, world.rank)
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written ({error.strerror}); choose another --output"
        ) from error


def main(argv=None):
    """Run one command line; returns 0, or the number of the signal that stopped training."""
    config = config_module.get_config(config_module.parse_args(argv), own_values)
    with distributed.session() as world:
        folder, log = open_run(config, world)
        try:
            set_up_device(config, world.device)
            if config.TRAIN.COMPILE and not config.EVAL_MODE:
                compiling.prepare(Path(config.OUTPUT) / "compile_cache", world.device)
            if config.THROUGHPUT_MODE:
                measure_throughput(config, world, log)
            elif config.EVAL_MODE:
                evaluate(config, world, folder, log)
            else:
                return train(config, world, folder, log)
            return 0
        except UserError as error:
            logger.to_file(log, f"error: {error}")  # the terminal gets it from `run_command`
            raise
        except Exception as error:
            logger.to_file(log, traceback.format_exc())
            if distributed.is_loss_of_peer(error):  # `session` says it on the terminal
                logger.to_file(log, f"error: {distributed.LOSS_OF_PEER}")
                raise
            explanation = faults.explain(error, config, world)
            if explanation is None:
                raise
            logger.to_file(log, f"error: {explanation}")
            raise UserError(explanation) from error
        finally:
            logger.close(log)


if __name__ == "__main__":
    run_command(main)
