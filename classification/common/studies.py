"""A batch of studies: the images of several, one after the other. A batch of single images is their tensor alone."""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import default_collate

VIEWS = ("", "AP", "PA", "lateral")  # that a model tells apart, the first for any other and for unknown ones


class Studies(NamedTuple):
    """images [R, 1 or 3, S, S], view [R] numbers of VIEWS, rows [B, V] of each study's images in them, -1 past the
    last."""

    images: torch.Tensor
    view: torch.Tensor
    rows: torch.Tensor

    def to(self, *arguments, **keywords):
        return Studies(*(part.to(*arguments, **keywords) for part in self))

    def record_stream(self, stream):
        for part in self:
            part.record_stream(stream)


def view_numbers(names):
    """Numbers [N] of VIEWS for names of views."""
    return np.array([VIEWS.index(name) if name in VIEWS else 0 for name in names])


def as_studies(batch):
    """The batch itself, or a tensor of images as studies of one image of unknown view."""
    if isinstance(batch, Studies):
        return batch
    numbers = torch.arange(batch.shape[0], device=batch.device)  # len() would fix the batch size of an exported file
    return Studies(batch, torch.zeros_like(numbers), numbers[:, None])


def images_of(batch):
    """The images of a batch [R, ...]."""
    return batch.images if isinstance(batch, Studies) else batch


def with_images(batch, images):
    """The same batch of other images [R, ...]."""
    return batch._replace(images=images) if isinstance(batch, Studies) else images


def size(batch):
    """How many studies, or images, a batch is of."""
    return len(batch.rows if isinstance(batch, Studies) else batch)


def join(parts):
    """One batch of several items: tensors of images, or :class:`Studies`."""
    if not isinstance(parts[0], Studies):
        return default_collate(parts)
    first, most = 0, max(part.rows.shape[1] for part in parts)
    rows = []
    for part in parts:
        rows.append(pad(part.rows.where(part.rows < 0, part.rows + first), (0, most - part.rows.shape[1]), value=-1))
        first += len(part.images)
    images, views = (torch.cat(of_parts) for of_parts in list(zip(*parts))[:2])
    return Studies(images, views, torch.cat(rows))
