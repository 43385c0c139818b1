"""A training run: its data, its step, and the state that checkpoints hold."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from yacs.config import CfgNode

import config as config_module
from analysis.metrics import Metric
from common import distributed
from common.distributed import World
from common.studies import images_of
from dataset.build import Loader, build_datasets, build_loader, fingerprint, worker_count
from dataset.mixing import build_mixing
from dataset.patients import patients_of, together
from models import build_model, pretrained_file
from training import checkpoint, sharding
from training.log import log_datasets, log_without_effect
from training.lr_scheduler import Schedule, build_schedule
from training.state import Best, Loss, Moments, Origin, Position, RandomNumbers, Rate, Scaler, Weights, collect, restore
from training.step import Step, build_step
from training.tasks import TASKS, Task
from training.teachers import check_teachers


@dataclass
class Run:
    """Everything a training run owns; made by :func:`build_run`.

    parts: what a checkpoint holds. val_sources: name of the source of each validation image, or None. to_compile: the
    next update compiles the model. last_images: the batch of the newest update [B, 3, S, S], for TensorBoard.
    """

    config: CfgNode
    world: World
    folder: Path
    log: object
    task: Task
    label_names: list
    train_loader: Loader
    val_loader: Loader
    step: Step
    schedule: Schedule
    position: Position
    metric: Metric
    best: Best
    ema_best: Best
    parts: list
    val_sources: object = None
    to_compile: bool = False
    last_images: torch.Tensor = None

    def end_reason(self):
        """Why training ends, in words: all epochs are done, or TRAIN.STOP_AFTER of them since the last better score."""
        done, train = self.position.epoch, self.config.TRAIN
        best = max(self.best.epoch, self.ema_best.epoch)
        if done >= train.EPOCHS:
            return f"{done} of {train.EPOCHS} epochs (TRAIN.EPOCHS)"
        if 0 < train.STOP_AFTER <= done - best and done % self.config.EVAL_FREQ == 0:
            return (
                f"{done} of {train.EPOCHS} epochs, none better since epoch {best} (TRAIN.STOP_AFTER {train.STOP_AFTER})"
            )
        return ""

    def batches(self):
        """The batches of the epoch from the next update on. Adds to its sums its images and the seconds waited."""
        sampler, sums = self.train_loader.batch_sampler, self.position.sums
        sampler.epoch = self.step.mix.epoch = self.position.epoch
        self.step.criterion.set_epoch(self.position.epoch)
        sampler.start_batch = self.position.update * self.step.accumulation
        asked = time.time()
        for images, targets, rows in self.train_loader:
            sums.waited += time.time() - asked
            sums.skipped += self.step.batch_size - int((rows >= 0).sum())
            self.last_images = images_of(images)
            sums.images += len(self.last_images)
            yield images, targets
            asked = time.time()

    def save(self, names, ema_names=()):
        """Checkpoint under each of `ema_names`, where a reader of `model` gets the EMA, then under each of `names`."""
        state = sharding.write(collect(self.parts), self.folder, self.world)
        if self.world.is_main:
            if ema_names:
                checkpoint.save(state | {"model": state["model_ema"], "weights": "model_ema"}, self.folder, ema_names)
            checkpoint.save(state, self.folder, names)
            sharding.remove_unused(self.folder)
        # A rank that ended before rank 0 has written would have the launcher kill it.
        distributed.gather(None, self.world)
        self.position.saved_at = self.position.epoch, self.position.update


def build_run(config, world, folder, log, stop):
    """The run of a configuration: at its start, or where a checkpoint left it. `stop` ends a validation too."""
    torch.manual_seed(config.SEED)
    # 1. The data first, since most mistakes show here, before anything slow.
    train_set, val_set = build_datasets(config, "train", "validate")
    log_datasets(log, config, train_set, val_set)
    train_loader = build_loader(config, train_set, train=True, world=world, log=log)
    val_loader = build_loader(config, val_set, train=False, world=world, log=log)
    val_loader.check = stop.check
    train_loader.while_waiting = val_loader.while_waiting = stop.while_waiting
    sampler, task = train_loader.batch_sampler, TASKS[train_set.task]
    data = {"train": fingerprint(train_set, sampler), "validate": fingerprint(val_set)}
    pseudo_labels, seen, learnt = check_teachers(train_set, config)
    trained = together(patients_of(train_set, config), learnt)
    patients = together(trained, seen, patients_of(val_set, config))
    # 2. A checkpoint before the model, which then needs no foreign weights.
    mesh = sharding.build_mesh(config, world)
    found = find_checkpoint(config, folder, log, mesh)
    model = build_model(config)
    log_without_effect(log, config, train_set, model, world.device)
    if found is None:
        start = start_weights(config, model, log)
        patients, trained = together(patients, start["patients"]), together(trained, start["trained"])
    # 3. The step, over the parameters as they are on the device.
    limit_threads(config, world)
    criterion = task.build_criterion(config, train_set.targets, sampler.expected, world.device)
    step = build_step(config, model, criterion, task.known, world, build_mixing(config), mesh)
    schedule = build_schedule(config, sampler.updates, world.size)
    # 4. What a checkpoint holds, in the order in which it is taken back.
    metric = task.best_metric(config.TRAIN.BEST_BY)
    images = config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * world.size
    start = config.TRAIN.START_EPOCH
    position = Position(world, log, data["train"], sampler.updates, images, epoch=start, saved_at=(start, 0))
    best, ema_best = (
        Best(key, metric, data["validate"], folder / name, log)
        for key, name in (("max_accuracy", checkpoint.BEST), ("max_ema_accuracy", checkpoint.EMA_BEST))
    )
    parts = [
        Origin(
            config,
            train_set.task,
            train_set.label_names,
            data,
            getattr(train_set, "domain", ""),
            log,
            patients,
            trained,
            pseudo_labels,
        ),
        Weights(model, step.ema, log),
        Loss(criterion, log),
        Moments(step.optimizer, log),
        Scaler(step.scaler),
        position,
        Rate(schedule, position, log),
        best,
        ema_best,
        RandomNumbers(world, log),
    ]
    torch.manual_seed(config.SEED + world.rank)  # drop path differs between ranks
    if found is not None:
        path, state = found
        restore(parts, state, path)
        log.info(f"resumed from {path}: epoch {position.epoch + 1}, update {position.update + 1}")
    run = Run(
        config, world, folder, log, task, train_set.label_names, train_loader, val_loader, step, schedule, position,
        metric, best, ema_best, parts, val_sources=getattr(val_set, "sources", None), to_compile=config.TRAIN.COMPILE,
    )  # fmt: skip
    _log_start(run)
    return run


def limit_threads(config, world):
    """On a CPU, computing threads that compete with the loading processes wait for each other: slower than fewer."""
    if world.device.type == "cpu":
        free = len(os.sched_getaffinity(0)) - worker_count(config)
        torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))


def find_checkpoint(config, folder, log, mesh=None):
    """(path, content) of the checkpoint to continue from, or None."""
    if not config.TRAIN.AUTO_RESUME:
        checkpoint.refuse_to_overwrite(folder)
    found = checkpoint.find_last(folder, log, mesh) if config.TRAIN.AUTO_RESUME else None
    if found is None:
        return (config.MODEL.RESUME, checkpoint.read(config.MODEL.RESUME, mesh)) if config.MODEL.RESUME else None
    if Path(config.MODEL.RESUME).absolute() == Path(found[0]).absolute():
        return found
    config_module.refuse_another_file(found[1]["config"], config, found[0])
    if config.MODEL.RESUME:
        # So that a job submitted with --resume continues from its own progress when it is requeued.
        log.warning(f"{found[0]} is used, not --resume: this run has begun. Use another --tag to begin a new one")
    return found


def start_weights(config, model, log):
    """Load MODEL.PRETRAINED, or what the backbone fetches, and log where the weights come from.

    Returns what `checkpoint.load_pretrained` does; without such weights empty `patients` and `trained`.
    """
    if path := pretrained_file(config):
        return checkpoint.load_pretrained(model, path, log, config.TRAIN.RAND_INIT_FT_HEAD)
    log.warning(
        "weights: random, since no --pretrained is given. Training from random weights takes many times as long and "
        "scores less; python download_weights.py --help names the published files"
    )
    return {"patients": {}, "trained": {}}


def _log_start(run):
    config, log, step = run.config, run.log, run.step
    slow = config.AMP_OPT_LEVEL == "O1" and step.dtype == torch.float32
    slow = " (AMP_DTYPE auto: this CPU has no units for bfloat16)" if slow else ""
    images = run.position.images_per_update
    log.info(
        f"{config.MODEL.TYPE} with {sum(p.numel() for p in step.model.parameters()):,} parameters on "
        f"{run.world.size} x {run.world.device.type}, {step.dtype}{slow}; {run.position.updates} updates of "
        f"{images} {config_module.units(config.DATA.UNIT)} per epoch, {worker_count(config)} loading processes"
    )
    log.info(
        f"peak learning rate {run.schedule.peak:.3e} = TRAIN.BASE_LR {config.TRAIN.BASE_LR:g} x batch "
        f"{images} / TRAIN.LR_REFERENCE_BATCH {config.TRAIN.LR_REFERENCE_BATCH}"
    )
    log.info(f"the best checkpoint is chosen by {run.metric.key}, {run.metric.direction} (TRAIN.BEST_BY)")
    updates = config.TRAIN.EPOCHS * run.position.updates
    for line in config_module.doubtful(config, updates, worker_count(config), run.world.size):
        log.warning(line)
    if run.world.is_main:
        checkpoint.check_space(config, run.folder, step.saved_bytes(), log)
    if config.TRAIN.COMPILE:
        log.info(
            "compiling the model: the first update takes minutes. What is made is kept in "
            f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}"
        )
