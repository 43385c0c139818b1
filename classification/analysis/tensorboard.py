"""Epochs for TensorBoard (LOG.TENSORBOARD): imported, like TensorBoard itself, only when asked for."""

import functools

import torch

from common.errors import UserError

IMAGES = 8  # of a batch


@functools.cache
def open_board(folder):
    """The writer of `folder`/tensorboard. UserError: TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"LOG.TENSORBOARD needs the package tensorboard (pip install tensorboard): {error}") from error
    return SummaryWriter(str(folder / "tensorboard"))


def _scalars(record, prefix=""):
    """(name, number) of every number in a record, those of inner mappings as outer/inner."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "epoch":
            yield prefix + key, value


def write_epoch(folder, record, images, mean, std):
    """An epoch's record and its last batch as it reached the model: images [B, 3, S, S], normalised by mean, std."""
    board = open_board(folder)
    for name, value in _scalars(record):
        board.add_scalar(name, value, record["epoch"])
    shown = images[:IMAGES].float().cpu()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    board.add_images("batch", (shown * std + mean).clamp(0, 1), record["epoch"])
    board.flush()
