"""Config -> datasets and loaders. A dataset is a file in this folder, found by DATA.DATASET."""

import os
import random

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

import builders
from dataset.images import ImageError
from dataset.transforms import normalize
from errors import UserError


def build_dataset(config, split):
    """The dataset of one split: items (image, target), `label_names`, `task`, `summary`, `rows()`."""
    build = builders.find("dataset", config.DATA.DATASET, "DATA.DATASET")
    if not config.DATA.DATA_PATH:
        raise UserError("DATA.DATA_PATH is empty; give the data folder with --data-path FOLDER")
    dataset = build(config, split)
    if len(dataset.label_names) != config.MODEL.NUM_CLASSES:
        raise UserError(
            f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, but the data has {len(dataset.label_names)} labels"
        )
    return dataset


class SeededDataset(torch.utils.data.Dataset):
    """Items by (epoch, index), with random numbers that depend on nothing but seed, epoch and index.

    Items: (image, target, index). So augmentation is the same for any number of workers and ranks, and after a resume.
    An unreadable image is handed on as the error itself: raised inside a worker, it would reach the
    user wrapped in the worker's traceback.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        with torch.random.fork_rng(devices=[]):  # workers apart, the model's own random numbers go on undisturbed
            states = random.getstate(), np.random.get_state()  # timm draws from both
            seed = hash((self.seed, epoch, int(index))) % 2**63
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            try:
                return *self.dataset[int(index)], int(index)
            except ImageError as error:
                return error
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])


def _collate(items):
    """(batch of the good items or None, errors of the others)."""
    errors = [item for item in items if isinstance(item, ImageError)]
    good = [item for item in items if not isinstance(item, ImageError)]
    return default_collate(good) if good else None, errors


class TrainSampler(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one rank: a permutation per epoch, cut to whole updates.

    start_batch: batches of this epoch already seen; set it, and epoch, before iterating.
    """

    def __init__(self, length, *, batch_size, accumulation, rank, world_size, seed):
        self.length, self.batch_size = length, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.updates = length // (batch_size * world_size * accumulation)
        self.batches = self.updates * accumulation
        self.epoch = self.start_batch = 0

    def __len__(self):
        return self.batches - self.start_batch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        batches = order[: self.batches * self.world_size * self.batch_size].view(-1, self.world_size, self.batch_size)
        for batch in batches[self.start_batch :, self.rank]:
            yield [(self.epoch, i) for i in batch.tolist()]


class EvalSampler(torch.utils.data.Sampler):
    """Batches of (0, index): rank r sees rows r, r + world, r + 2 world, ..., each row once."""

    def __init__(self, length, *, batch_size, rank, world_size):
        self.rows, self.batch_size = range(rank, length, world_size), batch_size

    def __len__(self):
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self):
        for start in range(0, len(self.rows), self.batch_size):
            yield [(0, i) for i in self.rows[start : start + self.batch_size]]


class Loader(DataLoader):
    """Batches on the device: images float32 [B, 3, S, S], normalised; targets; rows of the dataset [B].

    An unreadable image is an error, or with DATA.ON_BAD_IMAGE skip a line of the log and a batch that
    is smaller by it: no other image takes its place.
    """

    def __init__(self, config, dataset, sampler, device, log):
        workers = worker_count(config)
        super().__init__(
            SeededDataset(dataset, config.SEED),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=config.DATA.PIN_MEMORY and torch.cuda.is_available(),
            persistent_workers=workers > 0,
            # Each pass over a loader draws a seed; from the global generator it would shift the model's
            # random numbers, and differently so after a resume.
            generator=torch.Generator(),
        )
        self.device, self.log = device, log
        self.skip_bad = config.DATA.ON_BAD_IMAGE == "skip"
        # On the device once: as lists they would cross, and be waited for, with every batch.
        self.mean, self.std = (torch.tensor(v, device=device) for v in (config.AUG.MEAN, config.AUG.STD))

    def __iter__(self):
        for batch, errors in super().__iter__():
            if errors and not (self.skip_bad and batch):
                raise errors[0]
            for error in errors:
                self.log.warning(f"skipped (DATA.ON_BAD_IMAGE): {error}")
            images, targets, rows = batch
            images, targets = (t.to(self.device, non_blocking=True) for t in (images, targets))
            yield normalize(images, self.mean, self.std), targets, rows


def worker_count(config):
    """DATA.NUM_WORKERS, but no more than there are CPUs to run them."""
    return min(config.DATA.NUM_WORKERS, len(os.sched_getaffinity(0)))


def build_loader(config, dataset, *, train, world, log):
    """The :class:`Loader` of this rank.

    Raises:
        UserError: a training split with fewer images than one update takes.
    """
    batch_size, accumulation = config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS
    if train:
        sampler = TrainSampler(
            len(dataset),
            batch_size=batch_size,
            accumulation=accumulation,
            rank=world.rank,
            world_size=world.size,
            seed=config.SEED,
        )
        if sampler.updates == 0:
            raise UserError(
                f"the train split has {len(dataset)} images, fewer than one update takes (batch {batch_size} "
                f"x {world.size} processes x {accumulation} accumulation steps); use a smaller --batch-size"
            )
    else:
        sampler = EvalSampler(len(dataset), batch_size=batch_size, rank=world.rank, world_size=world.size)
    return Loader(config, dataset, sampler, world.device, log)
