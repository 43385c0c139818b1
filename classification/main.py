"""Train and evaluate. `python main.py --help` lists the flags; `config.py` lists every option.

    python main.py --cfg configs/internimage_b_mimic_cxr_224.yaml --data-path /scratch/mimic --pretrained FILE
    python -m jobs.launch main.py --cfg ... --data-path ... --pretrained FILE             every GPU of this machine
    python main.py --cfg ... --data-path ... --eval --resume output/.../best_ckpt.pth

Read `main` at the end first: it leads to `train` and `evaluate`. What they own is in `training/`.
"""

import contextlib
import json
import math
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path

import common.torchvision_shim  # noqa: F401

import torch

import config as config_module
from analysis import training_log
from analysis.evaluation import TEST, VALIDATE, new_evaluation, write_evaluation
from analysis.figures import plot_training
from common import distributed, logger
from common.errors import UserError, run_command
from common.files import reserved, write_whole
from common.studies import images_of, size
from dataset.build import build_datasets, build_loader, worker_count
from dataset.build import own_values as data_values
from models import own_values
from models.inference import device_name, peak_memory, progress, set_up_device
from training import checkpoint, compiling, faults, plan, sharding, testing, throughput
from training.log import log_datasets, log_without_effect
from training.optimizer import ema_decay
from training.run import build_run, limit_threads
from training.tasks import TASKS


# ------------------------------------------------------------------------------------------ train
def train(config, world, folder, log):
    """Train to the last epoch; returns 0, or the number of the signal that stopped it."""
    with distributed.StopRequest(world) as stop, distributed.only_run_in(folder, world):
        run = None
        try:
            with stop.at_once():  # nothing is lost yet
                run = build_run(config, world, folder, log, stop)
            if world.is_main:
                write_whole(folder / "config.json", json.dumps(config_module.to_dict(config), indent=2) + "\n")
            if run.end_reason():
                log.info(f"already finished: {run.end_reason()}")
            while not run.end_reason():
                train_epoch(run, stop)
                finish_epoch(run)
        except distributed.Stopped as stopped:
            return end_stopped(run, stopped.number, world, log)
    distributed.report_outcome(world, "finished")
    if world.is_main:
        try:
            plot_training(folder, run.task.metrics())
        except OSError as error:
            log.warning(f"{folder / 'training.png'} could not be written ({error.strerror})")
    if run.best.value is None:
        log.warning(
            "no label has both classes in the validation split, so there is no best checkpoint; "
            f"evaluate the last one with --eval --resume {folder / checkpoint.LAST}"
        )
    log.info(
        f"finished: best {run.metric.key} on the validation split {run.best.value} after {run.end_reason()}; "
        f"everything is in {folder}"
    )
    return 0


def train_epoch(run, stop):
    """The updates of an epoch that are left; at their end, and where training is asked to stop, a checkpoint."""
    position, config, batches = run.position, run.config, run.batches()
    first, sums, unit = position.update, run.position.sums, config_module.units(config.DATA.UNIT)
    started, seconds_before = time.time(), sums.seconds
    line_at, waited_before, checked = started, sums.waited, first  # of the last line of the log
    run.step.train()
    remaining = range(first, position.updates)
    for update in progress(remaining, run.world, desc=f"epoch {position.epoch + 1}", unit="update"):
        lr = run.schedule(position.epoch * position.updates + update)
        if run.step.ema is not None:
            run.step.ema.decay = ema_decay(config, position.epoch * position.updates + update)
        try:
            with stop.at_once() if run.to_compile else contextlib.nullcontext():
                loss, norm = run.step(batches, lr)
        except distributed.Stopped:  # before the update: in compiling, or in waiting for its images
            if run.world.size > 1:  # the other ranks wait for this one's gradients, and cannot save with it
                raise
            break
        now = time.time()
        sums.add(loss, norm)
        sums.seconds = seconds_before + now - started
        position.update = update + 1
        if run.to_compile:
            run.log.info(f"compiled: the first update took {now - started:.0f} s")
            run.to_compile = False
        stopped_by = stop.agreed()
        if stopped_by or position.update == position.updates or position.update % config.PRINT_FREQ == 0:
            # Looked at here only: reading a GPU value waits for the GPU.
            check_finite(run, f"epoch {position.epoch + 1}, update {checked + 1} to {position.update}")
            checked, now = position.update, time.time()
            speed = (position.update - first) * position.images_per_update / (now - started)
            waited = (sums.waited - waited_before) / (now - line_at)
            line_at, waited_before = now, sums.waited
            run.log.info(
                f"epoch {position.epoch + 1}/{config.TRAIN.EPOCHS} update {position.update}/{position.updates} loss "
                f"{sums.loss.item() / sums.updates:.4f} lr {lr:.3e} norm {norm.item():.3f} {speed:.1f} {unit}/s, "
                f"{waited:.0%} waiting for data, peak memory {peak_memory(run.world.device):.2f} GB"
            )
        if stopped_by:
            break
    if position.update > first:
        run.save([checkpoint.LAST])  # also before validation, which may fail
    stop.check()


def finish_epoch(run):
    """Validate if EVAL_FREQ is due, and write every checkpoint that is. A stop within it costs the validation alone."""
    config, done = run.config, run.position.epoch + 1
    is_best = is_ema_best = False
    if done % config.EVAL_FREQ == 0 or done == config.TRAIN.EPOCHS:
        is_best, is_ema_best = record_epoch(run)
    else:
        run.log.info(f"epoch {done} is not validated (EVAL_FREQ {config.EVAL_FREQ})")
    run.position.next_epoch()
    # LAST comes last: killed before it, the run validates again and writes the others again.
    names = [checkpoint.BEST] if is_best else []
    if done % config.SAVE_FREQ == 0 or run.end_reason():
        names.append(f"ckpt_epoch_{done}.pth")
    run.save([*names, checkpoint.LAST], ema_names=[checkpoint.EMA_BEST] if is_ema_best else [])
    if run.world.is_main:
        checkpoint.remove_old(run.folder, config.SAVE_KEEP)


def record_epoch(run):
    """Validate, and log the epoch; returns whether it is the best so far, of the model and of its EMA."""
    position, config, score = run.position, run.config, run.metric.key
    validated = validate(run, run.step.model)
    done, sums, last = position.epoch + 1, position.sums, (position.epoch + 1) * position.updates - 1
    record = {
        "epoch": done,
        "train_loss": distributed.mean(sums.loss.item(), run.world) / sums.updates,
        "lr": run.schedule(last),
        "grad_norm": sums.norm.item() / sums.updates,
        **validated,
    }
    if run.step.ema is not None:
        record["ema"] = validate(run, run.step.ema.module)
    # Only now, since a stop may end either validation.
    is_best = run.best.take(record[score], done)
    record[f"best_{score}"] = run.best.value
    is_ema_best = run.step.ema is not None and run.ema_best.take(record["ema"][score], done)
    if run.step.ema is not None:
        record["ema"]["best"] = run.ema_best.value
    waited = distributed.gather(sums.waited, run.world)
    record["skipped"] = sum(distributed.gather(sums.skipped, run.world))
    images = sum(distributed.gather(sums.images, run.world))
    record |= {"seconds": round(sums.seconds, 1), "images_per_s": round(images / sums.seconds, 1)}
    # The others wait, for its gradients, for the one that waits longest.
    record |= {"waited": round(max(waited) / sums.seconds, 3)}
    record |= {"peak_memory_gb": round(max(distributed.gather(peak_memory(run.world.device), run.world)), 2)}

    # The log before the checkpoint: a resume from it rewrites the lines of later epochs, so none is ever missing.
    if run.world.is_main:
        training_log.append_metrics(run.folder / "metrics.jsonl", record)
        if config.LOG.TENSORBOARD:
            from analysis import tensorboard

            tensorboard.write_epoch(run.folder, record, run.last_images, config.AUG.MEAN, config.AUG.STD)
    run.log.info(training_log.epoch_lines(record, run.metric))
    return is_best, is_ema_best


def validate(run, model):
    """What metrics.jsonl has of `model` on the validation split, the same on all ranks."""
    distributed.share_buffers(model, run.world)
    found = run.task.validate(
        model, run.val_loader, run.world, run.step.amp,
        label_names=run.label_names, metric=run.metric, sources=run.val_sources,
    )  # fmt: skip
    sharding.end_forward(model)
    return found.record


def end_stopped(run, number, world, log):
    """Log and report where training continues; the exit status."""
    log.info(f"stopped by {signal.Signals(number).name}; the same command continues from here")
    place = "{} {}".format(*run.position.saved_at) if run else "at the start"
    # A job script reads the file and requeues; to a shell the exit status says it.
    return 0 if distributed.report_outcome(world, f"interrupted {place}") else number


def check_finite(run, where):
    """A UserError if the loss or the gradient's norm has been infinite or NaN on any rank."""
    sums = run.position.sums
    if not math.isfinite(distributed.mean(sums.loss.item(), run.world) + sums.norm.item()):
        raise UserError(
            f"the loss or its gradient is not finite ({where}); earlier checkpoints are intact. Try a smaller "
            "TRAIN.BASE_LR, TRAIN.CLIP_GRAD 1, or --amp-opt-level O0"
        )


# --------------------------------------------------------------------------------------- evaluate
def evaluate(config, world, folder, log):
    """Evaluate a checkpoint into RESULTS/evaluation_<timestamp>, with its report; returns the folder.

    Publish these figures: they are those of the test split, which only this reads.
    """
    dataset, held_out = testing.build_test_sets(config, log)
    log_datasets(log, config, dataset)
    tested, task = testing.load_tested(config, folder, dataset, log), TASKS[dataset.task]
    log_without_effect(log, config, dataset, tested.model, world.device)
    warnings = testing.warnings_of(tested, dataset, config)
    for text in warnings:
        log.warning(text)
    target, unit = new_evaluation(config.RESULTS) if world.is_main else None, config_module.units(config.DATA.UNIT)
    tested.model.to(world.device)
    limit_threads(config, world)

    # Before an hour of work whose results find no room.
    with reserved(target, testing.expected_bytes(dataset, held_out)) if target else contextlib.nullcontext():
        log.info(f"evaluating {tested.path} on {len(dataset):,} test {unit}")
        started = time.time()
        predicted = {TEST: (dataset, testing.test_split(tested, dataset, config, world, log))}
        seconds = time.time() - started
        if held_out is not None:
            log.info(f"thresholds and calibration: {len(held_out):,} validation {unit}")
            predicted[VALIDATE] = held_out, testing.test_split(tested, held_out, config, world, log)
    if not world.is_main:
        return None
    found = predicted[TEST][1]
    metrics = testing.describe(tested, dataset, config, world, seconds=seconds, found=found, warnings=warnings)
    write_evaluation(target, metrics, predicted, tested.path.parent / "metrics.jsonl")
    log.info("test split\n" + task.table(metrics))
    if metrics["skipped"]:
        log.warning(f"{metrics['skipped']} of {len(dataset):,} test {unit} could not be read and do not count")
    log.info(f"results in {target}")
    if config.TEST.REPORT:
        log.info(task.report(target))
        log.info(f"report in {target / 'report.html'}")
    return target


def measure_throughput(config, world, log):
    """The training step of this configuration, and its parts: on random images, and on those of DATA_PATH, if given."""
    if config.THROUGHPUT_PLAN:
        log.info(plan.describe(config, world.device))
        return
    torch.manual_seed(config.SEED)
    loader = None
    if config.DATA.DATA_PATH or config.DATA.SOURCES:
        (dataset,) = build_datasets(config, "train")
        loader = build_loader(config, dataset, train=True, world=world, log=log)
        limit_threads(config, world)
    step = throughput.RandomStep(config, world.device, world)
    product = throughput.Product(world.device, step.step.dtype)
    seconds, of_product = throughput.step_seconds({"step": step, "product": product}, rounds=10).values()
    images = len(images_of(step.images))
    rate, matrices = images / sum(seconds), product.rate(*of_product)
    batch = images if images == size(step.images) else f"{size(step.images)} studies, {images} images"
    parts = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in zip(throughput.PARTS, seconds))
    log.info(
        f"training step: {rate:.1f} images/s (batch {batch}, {step.step.dtype}, {world.device}), ms: {parts}; "
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
        unit = config_module.units(config.DATA.UNIT)
        fed, items, waited = throughput.fed_rate(step, loader, batches, warm_up)
        total = timedelta(seconds=round(config.TRAIN.EPOCHS * len(dataset) / (items * world.size)))
        log.info(
            f"fed by the loader: {fed:.1f} images/s, {fed / rate:.0%} of that; {waited:.0%} waiting for data\n"
            f"TRAIN.EPOCHS {config.TRAIN.EPOCHS} of {len(dataset):,} {unit}: about {total} (hours:minutes:seconds)"
        )


# ------------------------------------------------------------------------------------------ entry
def open_run(config, world):
    """(folder of the run, its log); an evaluation needs a run that is there, or a checkpoint named by a flag."""
    folder = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
    if config.EVAL_MODE and not (config.MODEL.RESUME or config.MODEL.PRETRAINED or folder.is_dir()):
        tags = sorted({path.parent.name for path in folder.parent.glob("*/*ckpt*.pth")})
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
    args, saved, notes = config_module.parse_args(argv), None, []
    if not args.cfg:  # test a checkpoint as it was trained
        saved = checkpoint.read_config(args.resume), args.resume
    config = config_module.get_config(args, data_values, own_values, saved=saved, notes=notes)
    with distributed.session() as world:
        folder, log = open_run(config, world)
        for note in notes:
            log.warning(note)
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
