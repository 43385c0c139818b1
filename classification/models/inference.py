"""A model and a loader -> logits; the precision, the threads and the device's settings to compute them with."""

import contextlib
import os
import platform
import resource
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import distributed
from common.errors import UserError
from common.studies import images_of, with_images

# Parts of the image that --tta averages over: left, top and side as parts of its own. No flip: the heart has a side.
TTA = ((0, 0, 1), (0.05, 0.05, 0.9), (0, 0, 0.95), (0.05, 0, 0.95), (0, 0.05, 0.95), (0.05, 0.05, 0.95))


class Augmented(nn.Module):
    """A model of labels under test-time augmentation: the logits of its mean probability over the parts in TTA."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        """Images [N, 3, S, S], or Studies of such images -> float64 logits [N, L]."""
        images, found = images_of(batch), []
        size = images.shape[-1]
        for left, top, side in TTA:
            x, y, pixels = round(left * size), round(top * size), round(side * size)
            part = images[:, :, y : y + pixels, x : x + pixels]
            if side < 1:
                part = F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)
            found.append(self.model(with_images(batch, part)).double())
        logits = torch.stack(found)
        # By logarithms, since probabilities of 1 would all be one.
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)


def _fast_dtype(device):
    """What mixed precision is fastest in on a device: float32 where nothing narrower is computed by its own units."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Emulated, bfloat16 takes longer than float32: 1.4 times for InternImage-T.
    units = {"amx_bf16", "avx512_bf16", "bf16"}
    cpuinfo = Path("/proc/cpuinfo")
    return torch.bfloat16 if cpuinfo.exists() and units & set(cpuinfo.read_text().split()) else torch.float32


def device_name(device):
    """What a processor calls itself: 'NVIDIA A100-SXM4-80GB', 'AMD EPYC 7713 (8 threads)'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{name} ({threads} thread{'s' * (threads != 1)})"


def autocast(config, device):
    """Function that returns a fresh autocast context, and the dtype it computes in."""
    auto = config.AMP_DTYPE == "auto"
    dtype = _fast_dtype(device) if auto else getattr(torch, config.AMP_DTYPE)
    if config.AMP_OPT_LEVEL == "O0" or dtype == torch.float32:
        return contextlib.nullcontext, torch.float32
    return lambda: torch.autocast(device.type, dtype=dtype), dtype


def set_up_device(config, device):
    """What torch is told once a process: how exact, and whether the same each time, a device computes."""
    # Before the first matrix product on the GPU, or torch refuses deterministic ones.
    if config.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The operator uses it too: its backward pass then adds in a fixed order.
    torch.use_deterministic_algorithms(config.DETERMINISTIC)
    # Shapes do not change, so the fastest convolutions are worth a search; it may end differently each time.
    torch.backends.cudnn.benchmark = not config.DETERMINISTIC
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.TF32
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """The most memory so far, in GB: of a GPU what tensors took, on a CPU what the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
        real = rows.numpy() >= 0  # a rank that has a batch less than another gets one of a black image
        parts.append([part[real] for part in (logits.float().cpu().numpy(), targets.cpu().numpy(), rows.numpy())])
    model.train(was_training)
    parts = [part for of_rank in distributed.gather(parts, world) for part in of_rank]
    if not sum(len(rows) for *_, rows in parts):
        raise UserError("none of the images to evaluate can be read; see the lines above, `DATA.ON_BAD_IMAGE`")
    logits, targets, rows = (np.concatenate(column) for column in zip(*parts))
    if not np.isfinite(logits).all():
        raise UserError("the model's outputs are not finite; its weights are broken, use an earlier checkpoint")
    order = np.argsort(rows)
    return logits[order], targets[order], rows[order]
