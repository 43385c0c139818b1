"""Mixing of the images and targets of a training batch: mixup, cutmix."""

import common.torchvision_shim  # noqa: F401  (before torchvision)

import torch
from torchvision.transforms import v2

from common.studies import Studies


def _mixup(config):
    if config.AUG.MIXUP > 0:
        mixup = v2.MixUp(alpha=config.AUG.MIXUP, num_classes=config.MODEL.NUM_CLASSES)
        return mixup, 1 - config.AUG.MIXUP_SWITCH_PROB


def _cutmix(config):
    if config.AUG.CUTMIX > 0:
        cutmix = v2.CutMix(alpha=config.AUG.CUTMIX, num_classes=config.MODEL.NUM_CLASSES)
        return cutmix, config.AUG.MIXUP_SWITCH_PROB


# config -> (function (images [B, C, S, S], targets) -> (images, soft targets), its weight among those that are on), or
# None where it is off. C is 3, of studies 3 per image. Targets are [B, L] with NaN = unknown, or class indices [B]. To
# add one, write its row.
MIXINGS = [_mixup, _cutmix]


class Mixing:
    """One of `mixings`, chosen by weight, with `probability` for each batch; none from epoch `off_epoch` on (0: never).

    epoch: from 0; set it before each epoch. uses: config keys that have an effect, since something mixes.
    """

    def __init__(self, mixings, weights, probability, off_epoch):
        self.mix = v2.RandomApply([v2.RandomChoice(mixings, p=weights)], p=probability) if mixings else None
        self.uses = frozenset({"AUG.MIXUP_PROB", "AUG.MIXUP_OFF_EPOCH"} if mixings else ())
        self.off_epoch, self.epoch = off_epoch, 0

    def __call__(self, images, targets):
        if self.mix is None or (self.off_epoch and self.epoch >= self.off_epoch):
            return images, targets
        return self._mix_studies(images, targets) if isinstance(images, Studies) else self.mix(images, targets)

    def _mix_studies(self, batch, targets):
        """One draw for all images of a study, as its channels. A study mixes in the images of another one in their
        order, from the first again where that has fewer."""
        there = batch.rows >= 0
        slots = torch.arange(there.shape[1], device=there.device) % there.sum(1, keepdim=True)
        images = batch.images[batch.rows.gather(1, slots)]  # [B, V, 3, S, S]
        mixed, targets = self.mix(images.flatten(1, 2), targets)
        found = torch.empty_like(batch.images)
        found[batch.rows[there]] = mixed.view_as(images)[there]
        return batch._replace(images=found), targets


def build_mixing(config):
    """The :class:`Mixing` of a configuration."""
    found = [row for mixing in MIXINGS if (row := mixing(config))] if config.AUG.MIXUP_PROB else []
    mixings, weights = ([row[k] for row in found] for k in (0, 1))
    return Mixing(mixings, weights if len(found) > 1 else None, config.AUG.MIXUP_PROB, config.AUG.MIXUP_OFF_EPOCH)
