"""The learning rate as a pure function of the update number: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from `warmup_lr` to `peak`, then cosine, linear or step decay to `min_lr`.

    All lengths are in updates.
    """

    name: str
    total: int
    warmup: int
    peak: float
    warmup_lr: float
    min_lr: float
    decay_every: int = 1
    decay_rate: float = 0.1

    def __call__(self, step):
        if step < self.warmup:
            return self.warmup_lr + (self.peak - self.warmup_lr) * step / self.warmup
        if self.name == "step":
            return max(self.min_lr, self.peak * self.decay_rate ** ((step - self.warmup) // self.decay_every))
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.name == "cosine" else 1 - done
        return self.min_lr + (self.peak - self.min_lr) * left


def build_schedule(config, updates_per_epoch, world_size):
    """The schedule of a run; rates scale with batch x processes x accumulation / LR_REFERENCE_BATCH."""
    t = config.TRAIN
    scale = config.DATA.BATCH_SIZE * world_size * t.ACCUMULATION_STEPS / t.LR_REFERENCE_BATCH
    return Schedule(
        name=t.LR_SCHEDULER.NAME,
        total=t.EPOCHS * updates_per_epoch,
        warmup=t.WARMUP_EPOCHS * updates_per_epoch,
        peak=t.BASE_LR * scale,
        warmup_lr=t.WARMUP_LR * scale,
        min_lr=t.MIN_LR * scale,
        decay_every=t.LR_SCHEDULER.DECAY_EPOCHS * updates_per_epoch,
        decay_rate=t.LR_SCHEDULER.DECAY_RATE,
    )
