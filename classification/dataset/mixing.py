"""Mixing of the images and targets of a training batch: mixup, cutmix."""

import common.torchvision_shim  # noqa: F401  (before torchvision)

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from common.studies import Studies


def _mixup(config):
    if config.AUG.MIXUP > 0:
        mixup = v2.MixUp(alpha=config.AUG.MIXUP, num_classes=config.MODEL.NUM_CLASSES)
        return mixup, 1 - config.AUG.MIXUP_SWITCH_PROB


def _cutmix(config):
    classes, sides = config.MODEL.NUM_CLASSES, config.AUG.CUTMIX_MINMAX
    if sides or config.AUG.CUTMIX > 0:
        cutmix = _BoundedCutMix(sides, classes) if sides else v2.CutMix(alpha=config.AUG.CUTMIX, num_classes=classes)
        return cutmix, config.AUG.MIXUP_SWITCH_PROB


class _BoundedCutMix:
    """Cutmix whose part has sides between two shares of the image's, and lies in the image wholly, as in timm."""

    def __init__(self, sides, classes):
        self.sides, self.classes = sides, classes

    def __call__(self, images, targets):
        height, width = images.shape[2:]
        low, high = self.sides
        h, w = (round(side * float(torch.empty(()).uniform_(low, high))) for side in (height, width))
        top, left = (int(torch.randint(room + 1, ())) for room in (height - h, width - w))
        share, targets = h * w / (height * width), soft(targets, self.classes)
        images = images.clone()
        images[..., top : top + h, left : left + w] = images.roll(1, 0)[..., top : top + h, left : left + w]
        return images, (1 - share) * targets + share * targets.roll(1, 0)


def soft(targets, classes):
    """Class indices [B] as probabilities [B, classes]; targets [B, L] as they are."""
    return F.one_hot(targets, classes).float() if targets.ndim == 1 else targets


# config -> (function (images [B, C, S, S], targets) -> (images, soft targets), its weight among those that are on), or
# None where it is off. C is 3, of studies 3 per image. Targets are [B, L] with NaN = unknown, or class indices [B]. To
# add one, write its row.
MIXINGS = [_mixup, _cutmix]


class Mixing:
    """One of `mixings`, chosen by weight, with `probability` for each batch; none from epoch `off_epoch` on (0: never).

    mode: `batch` mixes it as a whole; `pair` decides anew for each pair of its images, `elem` for each image.
    classes: their number. epoch: from 0; set it before each epoch. uses: config keys that have an effect, since
    something mixes.
    """

    def __init__(self, mixings, weights, probability, off_epoch, mode, classes):
        self.mix = v2.RandomApply([v2.RandomChoice(mixings, p=weights)], p=probability) if mixings else None
        self.uses = frozenset({"AUG.MIXUP_PROB", "AUG.MIXUP_OFF_EPOCH", "AUG.MIXUP_MODE"} if mixings else ())
        self.off_epoch, self.epoch, self.mode, self.classes = off_epoch, 0, mode, classes

    def __call__(self, images, targets):
        if self.mix is None or (self.off_epoch and self.epoch >= self.off_epoch):
            return images, targets
        return self._mix_studies(images, targets) if isinstance(images, Studies) else self._mix(images, targets)

    def _mix(self, images, targets):
        """Images [B, C, S, S] and their targets, by the mode."""
        if self.mode == "batch":
            return self.mix(images, targets)
        # Each group is a batch of its own: an image and its partner, of which `elem` keeps the first.
        count, targets = len(images), soft(targets, self.classes)
        partner = torch.arange(count - 1, -1, -1) if self.mode == "pair" else torch.arange(count).roll(1)
        mixed = list(zip(images, targets))
        for k in range((count + 1) // 2 if self.mode == "pair" else count):
            group = [k, int(partner[k])]
            pictures, labels = self.mix(images[group], targets[group])
            mixed[k] = pictures[0], labels[0]
            if self.mode == "pair":
                mixed[group[1]] = pictures[1], labels[1]
        return tuple(torch.stack(part) for part in zip(*mixed))

    def _mix_studies(self, batch, targets):
        """One draw for all images of a study, as its channels. A study mixes in the images of another one in their
        order, from the first again where that has fewer."""
        there = batch.rows >= 0
        slots = torch.arange(there.shape[1], device=there.device) % there.sum(1, keepdim=True)
        images = batch.images[batch.rows.gather(1, slots)]  # [B, V, 3, S, S]
        mixed, targets = self._mix(images.flatten(1, 2), targets)
        found = torch.empty_like(batch.images)
        found[batch.rows[there]] = mixed.view_as(images)[there]
        return batch._replace(images=found), targets


def build_mixing(config):
    """The :class:`Mixing` of a configuration."""
    aug, found = config.AUG, [row for mixing in MIXINGS if (row := mixing(config))] if config.AUG.MIXUP_PROB else []
    mixings, weights = ([row[k] for row in found] for k in (0, 1))
    weights = weights if len(found) > 1 else None
    return Mixing(mixings, weights, aug.MIXUP_PROB, aug.MIXUP_OFF_EPOCH, aug.MIXUP_MODE, config.MODEL.NUM_CLASSES)
