"""What a training step costs, part by part, beside the rate of matrix products on the same device.

`main.py --throughput` says it of one configuration, `benchmarks/train_step.py` of several, side by side.
"""

import statistics
import time

import torch

from common.distributed import World
from common.studies import VIEWS, Studies, images_of, size
from models import build_model
from models.cost import count_gmacs
from training import sharding
from training.step import build_step, unmarked
from utils_multilabel import Criterion

PARTS = ("forward", "backward", "optimizer")


class Marks:
    """Moments of the device's time: on a GPU they are recorded among its work, and nothing waits for them."""

    clock = time.perf_counter  # of a CPU, in seconds

    def __init__(self, device):
        self.device, self.marks = device, []

    def __call__(self):
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = Marks.clock()
        self.marks.append(mark)

    def seconds(self):
        """Between each mark and the next."""
        pairs = list(zip(self.marks, self.marks[1:]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def random_batch(config, device, times=1):
    """`times` DATA.BATCH_SIZE random images, or as many studies, each of as many images as it may have."""
    count, most = times * config.DATA.BATCH_SIZE, config.DATA.MAX_VIEWS if config.DATA.UNIT == "study" else 1
    images = torch.randn(count * most, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE, device=device)
    numbers = torch.arange(len(images), device=device)
    studies = Studies(images, numbers % len(VIEWS), numbers.view(count, most))
    return studies if config.DATA.UNIT == "study" else images


class RandomStep:
    """The training step of a configuration on random images, with a loss that costs nothing.

    `step` is the one that training takes (:class:`training.step.Step`); its parts may be replaced. world: the ranks
    that take it together; without it this process alone.
    """

    def __init__(self, config, device, world=None):
        world = world or World(0, 1, device)
        model = build_model(config).to(device).train()
        self.device, self.gmacs = device, count_gmacs(model, config.DATA.IMG_SIZE)
        loss = Criterion("square", lambda logits, _: logits.square().mean(), {}, {})
        share, mesh = torch.ones((), device=device), sharding.build_mesh(config, world)
        self.step = build_step(config, model, loss, lambda targets, batch_size: share, world, mesh=mesh)
        self.step.accumulation = 1
        self.images = random_batch(config, device)

    def __call__(self, images=None, mark=unmarked):
        """One step; `mark` is called before it and after each of PARTS."""
        self.step(iter([(self.images if images is None else images, None)]), lr=1e-6, mark=mark)


class Product:
    """A product of two large square matrices, to have its turn among steps: the rate that they are held against."""

    def __init__(self, device, dtype):
        self.device, self.side = device, 8192 if device.type == "cuda" else 1024
        self.a, self.b = (torch.randn(self.side, self.side, device=device).to(dtype) for _ in range(2))

    def __call__(self, mark):
        mark()
        self.a @ self.b
        mark()

    def rate(self, seconds):
        """Multiplications and additions a second."""
        return 2 * self.side**3 / seconds


def step_seconds(steps, rounds, warm_up=2):
    """{name: seconds of each of PARTS}: medians over `rounds`, in which each of `steps` has its turn.

    steps: {name: RandomStep or Product}; a product has one part.

    By turns, since a machine that others share is not equally fast all the time. On a GPU a turn is ten steps without
    a wait, as in training.
    """
    turns = {name: [] for name in steps}
    for number in range(warm_up + rounds):
        for name, step in steps.items():
            for marks in [Marks(step.device) for _ in range(10 if step.device.type == "cuda" and number else 1)]:
                step(mark=marks)
                turns[name].append((number, marks))
    return {
        name: [statistics.median(s) for s in zip(*(marks.seconds() for number, marks in of_name if number >= warm_up))]
        for name, of_name in turns.items()
    }


def fed_rate(step, loader, batches, warm_up):
    """(images/s, items/s, share of time that waits for data) of the step on so many batches of a loader, after
    `warm_up`."""
    images = iter(loader)
    for _ in range(warm_up):
        step(next(images)[0])
    _finish(step.device)
    count, items, waited, started = 0, 0, 0.0, time.perf_counter()
    for _ in range(batches):
        asked = time.perf_counter()
        batch, _, _ = next(images)
        waited += time.perf_counter() - asked
        step(batch)
        count, items = count + len(images_of(batch)), items + size(batch)
    _finish(step.device)
    seconds = time.perf_counter() - started
    return count / seconds, items / seconds, waited / seconds


def _finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def share_of(rate, gmacs, images_per_s):
    """The part of a matrix rate that a training step reaches: two a multiply-add, thrice with the backward pass."""
    return 3 * 2e9 * gmacs * images_per_s / rate
