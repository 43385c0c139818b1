"""Which images an epoch holds, and in which order: batches of (epoch, index) for one rank."""

import numpy as np
import torch

from common.errors import UserError, did_you_mean


def _share_of_rarest(targets):
    """[N]: the share of the images that have the rarest label of each image; without a positive label, that of such.

    targets: [N, L] of 0 to 1, NaN = unknown, of which from .5 on is positive; or [N] class indices.
    """
    if targets.ndim == 1:
        return np.bincount(targets)[targets] / len(targets)
    positive = targets >= 0.5
    none = ~positive.any(1)
    return np.where(none, none.mean(), np.where(positive, positive.mean(0), 1).min(1))


# DATA.SAMPLER -> function(targets of the train split) -> weights [N] > 0, with which images are sampled. To add a
# sampler, write its row.
SAMPLERS = {
    "uniform": lambda targets: np.ones(len(targets)),
    "balanced": lambda targets: 1 / _share_of_rarest(targets),
    "sqrt": lambda targets: _share_of_rarest(targets) ** -0.5,
}


def sampling_weights(name, targets):
    """Weights [N] of row `name` of SAMPLERS. UserError: no such row."""
    if name not in SAMPLERS:
        raise UserError(f"DATA.SAMPLER is {name!r}; choose one of {', '.join(SAMPLERS)}{did_you_mean(name, SAMPLERS)}")
    return SAMPLERS[name](targets)


class TrainSampler(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one rank: an order of the images per epoch, cut to whole updates.

    groups: arrays of indices that take turns, so that an epoch of `length` images, and every batch up to one image,
    holds as many of each. Empty: all images are one group.
    weights: [length], by which the images of a group are sampled; None: alike.

    An image whose expected number in an epoch is x comes floor(x) or ceil(x) times, and x times in the mean of many
    epochs; its r-th repeat is the index + r length. The order depends only on seed and epoch, so that every rank and
    every resume has the same.

    start_batch: batches of this epoch already seen; set it, and epoch, before iterating.
    expected: [length], the expected number of times that an image comes in an epoch.
    """

    def __init__(self, length, *, batch_size, accumulation, rank, world_size, seed, groups=(), weights=None):
        self.length, self.batch_size = length, batch_size
        self.groups = groups or [np.arange(length)]
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.updates = length // (batch_size * world_size * accumulation)
        self.batches = self.updates * accumulation
        self.turns = -(-length // len(self.groups))
        weights, self.expected = np.ones(length) if weights is None else np.asarray(weights), np.empty(length)
        for rows in self.groups:
            self.expected[rows] = self.turns * weights[rows] / weights[rows].sum()
        self.uniform = bool((weights == weights[0]).all())
        self.epoch = self.start_batch = 0

    def __len__(self):
        return self.batches - self.start_batch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        columns = torch.stack([self._draw(rows, generator) for rows in self.groups], 1)  # [turns, groups]
        within = torch.rand(columns.shape, generator=generator).argsort(1)  # who comes first in a turn
        order = columns.gather(1, within).flatten()[: self.length]
        batches = order[: self.batches * self.world_size * self.batch_size].view(-1, self.world_size, self.batch_size)
        for batch in batches[self.start_batch :, self.rank]:
            yield [(self.epoch, i) for i in batch.tolist()]

    def _draw(self, rows, generator):
        """Indices [turns] of one group, with repeats."""
        rows = torch.from_numpy(rows)
        if self.uniform:  # all of them once, then once more, ...
            rounds = [
                rows[torch.randperm(len(rows), generator=generator)] + repeat * self.length
                for repeat in range(-(-self.turns // len(rows)))
            ]
            return torch.cat(rounds)[: self.turns]
        # Systematic sampling in a random order (Madow 1949): points at distance 1 on a line of the expected numbers.
        rows = rows[torch.randperm(len(rows), generator=generator)]
        ends = torch.from_numpy(self.expected)[rows].cumsum(0)
        ends[-1] = self.turns  # despite rounding
        reached = (ends + torch.rand((), generator=generator, dtype=ends.dtype)).floor().long()
        times = reached.diff(prepend=reached.new_zeros(1))
        first = (times.cumsum(0) - times).repeat_interleave(times)
        drawn = rows.repeat_interleave(times) + (torch.arange(self.turns) - first) * self.length
        return drawn[torch.randperm(self.turns, generator=generator)]


class EvalSampler(torch.utils.data.Sampler):
    """Batches of (0, index): rank r sees the images r, r + world, r + 2 world, ..., each once."""

    def __init__(self, length, *, batch_size, rank, world_size):
        self.indices, self.batch_size = range(rank, length, world_size), batch_size
        self.most = -(-length // (batch_size * world_size))  # batches of the rank that has most

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self):
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, i) for i in self.indices[start : start + self.batch_size]]
