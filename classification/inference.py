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
    """Logits and targets of every readable image of a loader, once each and in the order of its dataset.

    Returns:
        NumPy arrays, the same on every rank: logits float32 [N, L], the targets as the dataset has them
        ([N, L] or [N]), and the images' rows in the dataset [N].
    """
    was_training = model.training
    model.eval()
    parts = []
    for images, targets, rows in progress(loader, world, desc="evaluate", unit="batch"):
        with amp():
            logits = model(images)
        parts.append((logits.float().cpu().numpy(), targets.cpu().numpy(), rows.numpy()))
    model.train(was_training)
    parts = [part for of_rank in distributed.gather(parts, world) for part in of_rank]
    logits, targets, rows = (np.concatenate(column) for column in zip(*parts))
    if not np.isfinite(logits).all():
        raise UserError("the model's outputs are not finite; its weights are broken, use an earlier checkpoint")
    order = np.argsort(rows)
    return logits[order], targets[order], rows[order]
