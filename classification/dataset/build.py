"""Config -> datasets and loaders. What a dataset must be is said in :class:`Dataset`, and checked here."""

import contextlib
import hashlib
import math
import os
import random
import signal
import threading
from collections import deque
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from common import builders
from common.errors import UserError
from common.folders import check_tmpdir
from common.studies import images_of, join, with_images
from config import KNOBS, source_configs, units
from dataset.files.images import ImageError, take_warnings, warning_kind
from dataset.preparing import normalize
from dataset.samplers import EvalSampler, TrainSampler, sampling_weights
from dataset.sources import Sources, check_alike, check_folders, check_patients
from dataset.studies import StudyDataset, take_unreadable
from dataset.tables import EmptySplit


class Dataset(Protocol):
    """One split, as a module with `build(config, *splits) -> one dataset a split` makes it (DATA.DATASET names it).

    Items: (image uint8 tensor [1 or 3, S, S] with S = DATA.IMG_SIZE, target = targets[index]).
    It may have more. `domain`, see `dataset.files.domain`: a model is then not tested on another one without a word;
    `labels` [N, L] as in the label file (1, 0, -1 uncertain, NaN blank), by which a report tries other policies;
    `descriptions()`, further columns of a table of predictions (view, path); `root`, the folder of these paths;
    `cohort`, see `tables.Table.cohort`, what a report says of all splits; `label_mapping`, see `tables.Table`;
    `patients`, {split: names}, of all splits, by which two sources of one release are compared;
    `sources`, the name of each image's source [N], by which metrics are separated; `uses`, config keys that it uses
    beside those of every dataset of its task; `population`, whose patients its ids name, where it shares them with
    another dataset; `primary_metric`, the row of METRICS that heads its report (auc); `label_groups`, {group: smallest
    share of the training images}, the most frequent labels first; `pseudo_labels`, see `dataset.pseudo_labels`.

    A module may have DEFAULTS, {config key: value} that differ from those of `config.py`.
    """

    task: str  # multilabel or single_label
    label_names: tuple  # L texts, one a label or class
    targets: np.ndarray  # multilabel: float32 [N, L] of 0 to 1, NaN = unknown; single_label: N class indices
    summary: str  # for the log
    warnings: list  # texts, logged as warnings

    def __len__(self): ...

    def __getitem__(self, index): ...

    def ids(self):
        """What identifies the images in tables of predictions: column name -> values [N]."""


def _fault(dataset, config):
    """What `dataset` lacks of :class:`Dataset`, in a few words; an empty text where it is complete."""
    lacking = [name for name in (*Dataset.__annotations__, "ids", "__len__") if not hasattr(dataset, name)]
    if lacking:
        return f"has no {lacking[0]}"
    if dataset.task not in ("multilabel", "single_label"):
        return f"has the task {dataset.task!r}; it must be multilabel or single_label"
    for texts in (dataset.label_names, dataset.warnings, [dataset.summary]):
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            return "must have lists of texts as label_names and warnings, and a text as summary"
    count, labels, targets = len(dataset), len(dataset.label_names), np.asarray(dataset.targets)
    if not count:
        return "has no images"
    for name, column in dataset.ids().items():
        if len(column) != count:
            return f"has {count} images, but ids() has {len(column)} values in {name}"
    if dataset.task == "multilabel":
        if targets.shape != (count, labels) or targets.dtype != np.float32:
            return f"has targets {targets.dtype} {targets.shape}; expected float32 {(count, labels)}"
        if ((targets < 0) | (targets > 1)).any():
            return f"has targets from {np.nanmin(targets)} to {np.nanmax(targets)}; expected 0 to 1, or NaN = unknown"
    elif targets.shape != (count,) or targets.dtype.kind not in "iu" or targets.min() < 0 or targets.max() >= labels:
        return f"has targets {targets.dtype} {targets.shape}; expected {count} integers from 0 to {labels - 1}"
    # With its own random numbers: those of the run must not depend on this look.
    item = SeededDataset(dataset, config.SEED)[0, 0]
    if isinstance(item, ImageError):
        return ""  # what is to be done about it is the loader's business
    image, target, _ = item
    size = config.DATA.IMG_SIZE
    if not torch.is_tensor(image) or image.dtype != torch.uint8 or image.shape[1:] != (size, size):
        form = f"{image.dtype} {tuple(image.shape)}" if torch.is_tensor(image) else type(image).__name__
        return f"gives images that are {form}; expected torch.uint8 (1 or 3, {size}, {size}), before any normalisation"
    if len(image) not in (1, 3):
        return f"gives images of {len(image)} channels; expected 1 or 3"
    if not np.array_equal(np.asarray(target), targets[0], equal_nan=targets.dtype.kind == "f"):
        return f"gives item 0 the target {target}, but targets[0] is {targets[0]}"
    return ""


def own_values(config):
    """{config key: value}: the defaults for X-rays, for `config.get_config`, none for a module with TASK single_label;
    and those of the dataset, of several sources of the first."""
    names = dict.fromkeys(one.DATA.DATASET for one in source_configs(config).values())
    modules = [builders.find("dataset", name, "DATA.DATASET") for name in names]
    tasks = {getattr(module, "TASK", "multilabel") for module in modules}
    own = {key: knob.xrays for key, knob in KNOBS.items() if knob.xrays is not None and "multilabel" in tasks}
    return own | getattr(modules[0], "DEFAULTS", {})


def build_datasets(config, *splits):
    """One :class:`Dataset` for each of `splits`, over the same tables; of several sources (DATA.SOURCES) their union;
    with DATA.UNIT study of studies (:class:`dataset.studies.StudyDataset`).

    A source without one of the splits is left out of it with a warning, but for the first, which all must have. One
    with DATA.PSEUDO_LABELS has the labels of the first, where DATA.LABELS names none.

    UserError: no such dataset, faulty data, a dataset that is not complete, or another number of labels than the model
    has; of several sources named with the source.
    """
    found = _build_union(config, splits) if config.DATA.SOURCES else _build_one(config, *splits)
    if config.DATA.UNIT == "image":
        return found
    d = config.DATA
    return [
        StudyDataset(images, most=d.MAX_VIEWS, train=split == "train", skip=d.ON_BAD_IMAGE == "skip")
        for split, images in zip(splits, found)
    ]


def _build_union(config, splits):
    """The datasets of all sources together."""
    configs, built, warnings = source_configs(config), {}, []
    check_folders(configs)
    for name, one in configs.items():
        if built and one.DATA.PSEUDO_LABELS and not one.DATA.LABELS:
            one.defrost()
            one.DATA.LABELS = list(next(iter(built.values()))[0].label_names)
        try:
            built[name], missing = _build_source(one, splits)
        except UserError as error:
            raise type(error)(f"DATA.SOURCES {name}: {error}") from error
        if missing:
            warnings.append(f"DATA.SOURCES {name} has no part in {', '.join(splits[len(built[name]) :])}: {missing}")
    first = {name: datasets[0] for name, datasets in built.items()}
    check_alike(first)
    check_patients(configs, first)
    found = []
    for k, split in enumerate(splits):
        parts = {name: datasets[k] for name, datasets in built.items() if k < len(datasets)}
        if not parts:
            raise EmptySplit(f"none of DATA.SOURCES has an image of the split {split!r}")
        found.append(Sources(parts, split, warnings))
    return found


def _build_source(config, splits):
    """(datasets of as many of `splits`, from the first on, as are not empty; the error of the next or None)."""
    missing = None
    for count in range(len(splits), 0, -1):
        try:
            return _build_one(config, *splits[:count]), missing
        except EmptySplit as error:
            missing = error
    raise missing


def _build_one(config, *splits):
    """The datasets of DATA.DATASET, checked."""
    name = config.DATA.DATASET
    module = builders.find("dataset", name, "DATA.DATASET")
    if not config.DATA.DATA_PATH:
        raise UserError("DATA.DATA_PATH is empty; give the data folder with --data-path FOLDER")
    datasets = module.build(config, *splits)
    if not isinstance(datasets, (list, tuple)) or len(datasets) != len(splits):
        raise UserError(f"DATA.DATASET {name}: build(config, {', '.join(splits)}) must return a list of {len(splits)}")
    for split, dataset in zip(splits, datasets):
        if fault := _fault(dataset, config):
            raise UserError(f"DATA.DATASET {name}: the {split} split {fault} (see dataset/build.py, Dataset)")
        if dataset.label_names != datasets[0].label_names:
            raise UserError(f"DATA.DATASET {name}: the splits {splits[0]} and {split} have different labels")
    labels = len(datasets[0].label_names)
    if labels != config.MODEL.NUM_CLASSES:
        names = ", ".join(datasets[0].label_names[:20]) + (", ..." if labels > 20 else "")
        raise UserError(
            f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, but the data has {labels} labels ({names}); set "
            f"MODEL.NUM_CLASSES {labels}, or name the labels to learn with DATA.LABELS"
        )
    return datasets


def fingerprint(dataset, sampler=None):
    """A digest of the images and targets of a dataset, by which a resumed run knows them again.

    sampler: its :class:`TrainSampler`, whose order of the images then counts as well.
    """
    digest = hashlib.sha256(np.ascontiguousarray(dataset.targets))
    for column in dataset.ids().values():
        digest.update("\n".join(map(str, column)).encode())
    if sampler is not None:
        order = np.array([sampler.seed, *map(len, sampler.groups)])
        for part in (order, *sampler.groups, sampler.expected):
            digest.update(part)
    return digest.hexdigest()


class SeededDataset(torch.utils.data.Dataset):
    """Items by (epoch, index), with random numbers that depend on nothing but seed, epoch and index; an index beyond
    the length is a repeat, with random numbers of its own.

    Items: (image, target, index). So augmentation is the same for any number of workers and ranks, and after a resume.
    An unreadable image is handed on as the error itself: raised inside a worker, it would reach the
    user wrapped in the worker's traceback.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, number = key
        index = int(number) % len(self.dataset)  # beyond the length it is a repeat within the epoch
        with torch.random.fork_rng(devices=[]):  # workers apart, the model's own random numbers go on undisturbed
            states = random.getstate(), np.random.get_state()  # timm draws from both
            seed = hash((self.seed, epoch, int(number))) % 2**63
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 1 ms, and seeds GPUs
            random.seed(seed)
            np.random.seed(seed % 2**32)
            try:
                return *self.dataset[index], index
            except ImageError as error:
                return error
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])


def _collate(items):
    """(batch of the good items or None, errors of the other images, warnings of this loading process)."""
    errors = [item for item in items if isinstance(item, ImageError)] + take_unreadable()
    good = [item for item in items if not isinstance(item, ImageError)]
    if not good:
        return None, errors, take_warnings()
    images, *others = zip(*good)
    return (join(images), *map(default_collate, others)), errors, take_warnings()


def taken_ahead(items, count):
    """The same items; each is handed out when `count` more have been taken, or the last."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


# Signals that the main process handles. A loading process that died of one would end the run.
STOPS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP}
POLL, WARN_AFTER, LONGEST_WAIT = 5, 60, 1800  # seconds


def _begin_worker(_number):
    """Only the parent ends a loading process, by SIGTERM: whatever else is sent to the whole group is not for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def obey_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


@contextlib.contextmanager
def _stops_blocked():
    """Processes that begin meanwhile have STOPS blocked; this one gets what came at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Loader(DataLoader):
    """Batches on the device: images float32 [B, 3, S, S], normalised, or :class:`common.studies.Studies` of them;
    targets; indices into the dataset [B].

    DATA.PREFETCH batches are on their way to a GPU, on a stream of their own, while it computes with the one before.

    An unreadable image is an error. With DATA.ON_BAD_IMAGE skip it is logged and left out: no other image takes its
    place, and the batch is smaller. Where no image of a batch can be read, training gets black images with unknown
    labels and the indices -1; so does evaluation where another rank has a batch more: all take as many steps. What is
    odd about images that are read is logged once a kind.

    check(): called before each batch of an EvalSampler, as often on every rank. while_waiting(seconds): called every
    few seconds while no batch comes, and where a loading process has ended. Either may raise to end the work.

    UserError: TMPDIR is too long, or no batch comes for LONGEST_WAIT seconds.
    """

    check = staticmethod(lambda: None)
    while_waiting = staticmethod(lambda seconds: None)

    def __init__(self, config, dataset, sampler, device, log):
        workers = worker_count(config)
        check_tmpdir(workers, "DATA.NUM_WORKERS 0")
        super().__init__(
            SeededDataset(dataset, config.SEED),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=config.DATA.PIN_MEMORY and torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=_begin_worker,
            timeout=LONGEST_WAIT if workers else 0,
            # Each pass over a loader draws a seed; from the global generator it would shift the model's
            # random numbers, and differently so after a resume.
            generator=torch.Generator(),
        )
        self.device, self.log = device, log
        self.warned_kinds = set()
        self.task, self.size = dataset.task, config.DATA.IMG_SIZE
        self.skip_bad = config.DATA.ON_BAD_IMAGE == "skip"
        self.prefetch = config.DATA.PREFETCH if device.type == "cuda" else 0
        # On the device once: as lists they would cross, and be waited for, with every batch.
        self.mean, self.std = (torch.tensor(v, device=device) for v in (config.AUG.MEAN, config.AUG.STD))

    def __iter__(self):
        stream = torch.cuda.Stream(self.device) if self.prefetch else None
        checks = getattr(self.batch_sampler, "most", 0)
        crossing = (self._send(batch, stream) for batch in self._readable())
        for images, targets, indices, sent in taken_ahead(crossing, self.prefetch):
            if sent is not None:
                here = torch.cuda.current_stream(self.device)
                here.wait_event(sent)
                for tensor in (images, targets):
                    tensor.record_stream(here)  # or its memory might be given to a later batch while it is read
            checks -= 1
            self.check()
            yield with_images(images, normalize(images_of(images), self.mean, self.std)), targets, indices
        for _ in range(checks):  # another rank has one more, and a sharded model is gathered by all
            self.check()
            images, targets, indices = self._stand_ins(1)
            yield normalize(images.to(self.device), self.mean, self.std), targets, indices

    def _send(self, batch, stream):
        """(images, targets, indices, the event of their arrival): a batch under way to the device on `stream`."""
        images, targets, indices = batch
        with torch.cuda.stream(stream):  # None: the stream of the computation
            images, targets = (t.to(self.device, non_blocking=True) for t in (images, targets))
        return images, targets, indices, stream.record_event() if stream else None

    def _readable(self):
        """Batches as they are loaded, bytes on the CPU; what could not be read is logged, or raised."""
        for batch, errors, odd in self._loaded():
            for _, text, name in odd:
                if (kind := warning_kind(text)) not in self.warned_kinds:
                    self.warned_kinds.add(kind)
                    self.log.warning(f"{name}: {text}; logged once, `prepare_mimic.py audit` counts such images")
            if errors and not self.skip_bad:
                raise errors[0]
            for error in errors:
                self.log.warning(f"skipped (DATA.ON_BAD_IMAGE): {error}")
            if batch or isinstance(self.batch_sampler, TrainSampler):
                if not batch and self.task != "multilabel":  # a class is never unknown
                    raise errors[0]
                yield batch or self._stand_ins(len(errors))

    def _stand_ins(self, count):
        """A batch of black images of no row, whose labels are unknown, or whose class is 0."""
        shape = (count, *np.shape(self.dataset.dataset.targets)[1:])
        targets = torch.full(shape, torch.nan) if self.task == "multilabel" else torch.zeros(shape, dtype=torch.long)
        return torch.zeros(count, 1, self.size, self.size, dtype=torch.uint8), targets, torch.full((count,), -1)

    def _loaded(self):
        """What `_collate` made of each batch, in order."""
        with _stops_blocked():
            if self._iterator is not None:  # the processes are kept; that each is ready cannot be asked for twice
                self._iterator._timeout = LONGEST_WAIT
            batches = super().__iter__()
            batches._timeout = POLL
            # torch's handler raises wherever the main thread is, in an update too. `next` finds a dead process itself.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        waited = 0
        while True:
            try:
                yield next(batches)
            except StopIteration:
                return
            except RuntimeError as error:  # of torch: a loading process ended, or nothing came for POLL seconds
                if "DataLoader timed out" not in str(error):
                    self.while_waiting(math.inf)
                    raise
                waited += POLL
                self.while_waiting(waited)
            else:
                waited = 0
                continue
            if waited == WARN_AFTER:
                self.log.warning(f"no batch of images has come for {waited} s: the data's file system is slow or hangs")
            if waited >= LONGEST_WAIT:
                raise UserError(
                    f"no batch of images came for {waited} s: the loading processes hang, most likely in reading "
                    f"{getattr(self.dataset.dataset, 'root', 'the data')}; DATA.NUM_WORKERS 0 shows where"
                )


def worker_count(config):
    """DATA.NUM_WORKERS, but no more than there are CPUs for this process of those that torchrun started here."""
    cpus = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(config.DATA.NUM_WORKERS, max(cpus, 1))


def build_loader(config, dataset, *, train, world, log):
    """The :class:`Loader` of this rank. UserError: a training split with fewer images than one update takes."""
    batch_size, accumulation = config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS
    if train:
        sampler = TrainSampler(
            len(dataset),
            batch_size=batch_size,
            accumulation=accumulation,
            rank=world.rank,
            world_size=world.size,
            seed=config.SEED,
            weights=sampling_weights(config.DATA.SAMPLER, np.asarray(dataset.targets)),
            groups=dataset.rows_of_sources if config.DATA.SOURCES and config.DATA.SOURCES_MIX == "even" else (),
        )
        if sampler.updates == 0:
            raise UserError(
                f"the train split has {len(dataset)} {units(config.DATA.UNIT)}, fewer than one update takes "
                f"(batch {batch_size} x {world.size} processes x {accumulation} accumulation steps); use a smaller "
                "--batch-size"
            )
    else:
        sampler = EvalSampler(len(dataset), batch_size=batch_size, rank=world.rank, world_size=world.size)
    return Loader(config, dataset, sampler, world.device, log)
