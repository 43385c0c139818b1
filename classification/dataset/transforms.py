"""PIL image -> uint8 tensor, with augmentation for training.

An image stays uint8 until it is on the device (`dataset.preparing.normalize`): a grayscale one crosses in an eighth of
the bytes.
"""

import common.torchvision_shim  # noqa: F401  (before torchvision)

import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from common.errors import UserError
from dataset.preparing import Square, evaluation_transform, resized_side

INTERPOLATION = {"bicubic": v2.InterpolationMode.BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}


class Erasing:
    """timm's random erasing (AUG.REPROB, REMODE, RECOUNT) of a uint8 image; its noise has AUG.MEAN and AUG.STD."""

    def __init__(self, aug):
        self.erase = RandomErasing(aug.REPROB, mode=aug.REMODE, max_count=aug.RECOUNT, device="cpu")
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (aug.MEAN, aug.STD))

    def __call__(self, image):
        mean, std = (v.mean(0, keepdim=True) if len(image) == 1 else v for v in (self.mean, self.std))
        noise = self.erase(torch.full(image.shape, torch.nan))  # NaN where nothing is erased
        return torch.where(noise.isnan(), image, ((noise * std + mean) * 255).round().clamp(0, 255).to(torch.uint8))


class RandomGamma:
    """value ** gamma, gamma drawn log-uniformly from 1 / (1 + strength) to 1 + strength."""

    def __init__(self, strength):
        self.bound = torch.tensor(1.0 + strength).log()

    def __call__(self, image):
        return v2.functional.adjust_gamma(image, float(((torch.rand(()) * 2 - 1) * self.bound).exp()))


def _affine(config):
    aug, bilinear = config.AUG, v2.InterpolationMode.BILINEAR
    if aug.ROTATION > 0 or aug.SHIFT > 0:
        return v2.RandomAffine(aug.ROTATION, translate=(aug.SHIFT, aug.SHIFT), interpolation=bilinear)


def _crop(config):
    # The heart's relative width is itself a sign, hence the narrow range of ratios.
    scale, interpolation = tuple(config.AUG.CROP_SCALE), INTERPOLATION[config.DATA.INTERPOLATION]
    return v2.RandomResizedCrop(config.DATA.IMG_SIZE, scale=scale, ratio=(0.9, 1.1), interpolation=interpolation)


def _jitter(config):
    if (strength := config.AUG.COLOR_JITTER) > 0:
        return v2.ColorJitter(brightness=strength, contrast=strength)


# The augmentations of X-rays in the order in which they act: config -> step, uint8 tensor [1 or 3, H, W] -> the same,
# or None where it is off. To add one, write its row.
RADIOGRAPH_AUGMENTATIONS = [
    _affine,
    _crop,
    lambda config: v2.RandomHorizontalFlip(config.AUG.HFLIP) if config.AUG.HFLIP > 0 else None,
    _jitter,
    lambda config: RandomGamma(config.AUG.GAMMA) if config.AUG.GAMMA > 0 else None,
    lambda config: Erasing(config.AUG) if config.AUG.REPROB > 0 else None,
]


def radiograph_transform(config, train):
    """For X-rays, grayscale or RGB: resized as a whole, for training with RADIOGRAPH_AUGMENTATIONS."""
    if not train:
        return evaluation_transform(config)
    data = config.DATA
    # A square first, as for the test: crops of the original would have other proportions.
    side = resized_side(data.IMG_SIZE)
    square = Square(side, side, data.INTERPOLATION, data.RESIZE)
    return v2.Compose([square, *filter(None, (augmentation(config) for augmentation in RADIOGRAPH_AUGMENTATIONS))])


def photo_transform(config, train):
    """For photographs: timm's ImageNet recipe, as the published models were trained."""
    aug, data = config.AUG, config.DATA
    if not train:
        interpolation = INTERPOLATION[data.INTERPOLATION]
        middle = [v2.Resize(data.IMG_SIZE, interpolation), v2.CenterCrop(data.IMG_SIZE)]
        steps = middle if config.TEST.CROP else [v2.Resize((data.IMG_SIZE, data.IMG_SIZE), interpolation)]
        return v2.Compose([*steps, v2.PILToTensor()])
    try:
        steps = create_transform(
            data.IMG_SIZE,
            is_training=True,
            scale=tuple(aug.CROP_SCALE),
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER,
            auto_augment=aug.AUTO_AUGMENT or None,
            interpolation=data.INTERPOLATION,
            mean=tuple(aug.MEAN),  # RandAugment fills with it
            normalize=False,
        )
    except (AssertionError, ValueError) as error:  # timm's, of a policy that it does not have
        raise UserError(
            f"AUG.AUTO_AUGMENT is {aug.AUTO_AUGMENT!r}: {error}; write it as timm does, such as "
            "rand-m9-mstd0.5-inc1, or leave it empty"
        ) from error
    return v2.Compose([steps, *([Erasing(aug)] if aug.REPROB > 0 else [])])
