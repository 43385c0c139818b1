"""Small tools of the entry points that know only torch."""

import contextlib
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

import distributed
from errors import UserError


def autocast(config, device):
    """Function that returns a fresh autocast context, and the dtype it computes in."""
    if config.AMP_OPT_LEVEL == "O0":
        return contextlib.nullcontext, torch.float32
    name = config.AMP_DTYPE
    if name == "auto":
        name = (
            "bfloat16" if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        )
    dtype = getattr(torch, name)
    return lambda: torch.autocast(device.type, dtype=dtype), dtype


def compute_threads(threads, workers):
    """How many of `threads` to compute with on a CPU beside so many loading processes."""
    return max(1, min(threads, len(os.sched_getaffinity(0)) - workers))


def progress(iterable, world, **arguments):
    """A progress bar where somebody watches: on rank 0's terminal, never in a file."""
    show = world.is_main and sys.stderr.isatty()
    return tqdm(iterable, disable=not show, leave=False, dynamic_ncols=True, **arguments)


@torch.no_grad()
def predict(model, loader, world, amp):
    """Logits and targets of every image of a loader, once each and in the order of its dataset.

    Returns:
        NumPy arrays, float32 [N, L] and the targets as the dataset has them ([N, L] or [N]);
        the same on every rank.
    """
    was_training = model.training
    model.eval()
    logits, targets = [], []
    for images, target in progress(loader, world, desc="evaluate", unit="batch"):
        with amp():
            output = model(images.to(world.device, non_blocking=True))
        logits.append(output.float().cpu())
        targets.append(target)
    model.train(was_training)
    # A rank has no row at all where there are more ranks than images.
    rows = [torch.cat(t).numpy() if t else None for t in (logits, targets)]
    logits, targets = (distributed.gather_rows(r, world) for r in rows)
    if not np.isfinite(logits).all():
        raise UserError("the model's outputs are not finite; its weights are broken, use an earlier checkpoint")
    return logits, targets
