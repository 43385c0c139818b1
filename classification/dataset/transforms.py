"""PIL image -> uint8 tensor, with augmentation for training; batches of them -> what the model takes.

An image stays uint8 until it is on the device (:func:`normalize`): an eighth of the bytes that cross, for a grey one.
"""

import common.torchvision_shim  # noqa: F401  (before torchvision)

import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

INTERPOLATION = {"bicubic": v2.InterpolationMode.BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}


def normalize(images, mean, std):
    """uint8 [N, 1 or 3, S, S] -> float32 [N, 3, S, S] of (value / 255 - mean) / std, on the device of `images`."""
    mean, std = (torch.as_tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - mean) / std


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


def resized_side(size):
    """Side in pixels to which an image is resized before a crop of `size` is taken."""
    return int(size * 8 / 7)


def _whole(side, interpolation, how):
    """The whole image as a square: squeezed, or with its aspect kept and black beside it."""
    if how == "pad":
        return [v2.Resize(None, interpolation, max_size=side), v2.CenterCrop(side)]  # the crop pads what is too small
    return [v2.Resize((side, side), interpolation)]


def _middle(size, interpolation):
    return [v2.Resize(resized_side(size), interpolation), v2.CenterCrop(size)]


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
    """For X-rays, grey or RGB: resized as a whole, for training with RADIOGRAPH_AUGMENTATIONS.

    A tensor from the start: torch resizes uint8 twice as fast as Pillow, to within one grey level of it.
    """
    size, interpolation = config.DATA.IMG_SIZE, INTERPOLATION[config.DATA.INTERPOLATION]
    # A square first, for training and test alike: crops of the original would have other proportions.
    side = resized_side(size) if train or config.TEST.CROP else size
    steps = [v2.PILToTensor(), *_whole(side, interpolation, config.DATA.RESIZE)]
    if not train:
        return v2.Compose([*steps, v2.CenterCrop(size)])
    return v2.Compose([*steps, *filter(None, (augmentation(config) for augmentation in RADIOGRAPH_AUGMENTATIONS))])


def placement(config, height, width):
    """What part of an X-ray of so many pixels the model sees, without augmentation: left, top, right, bottom.

    In pixels of the X-ray; beyond its border where `DATA.RESIZE pad` puts black.
    """
    size = config.DATA.IMG_SIZE
    part = size / resized_side(size) if config.TEST.CROP else 1
    if config.DATA.RESIZE == "squeeze":
        across, down = part * width, part * height
    else:
        across = down = part * max(height, width)
    return (width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2


def photo_transform(config, train):
    """For photographs: timm's ImageNet recipe, as the published models were trained."""
    aug, data = config.AUG, config.DATA
    if not train:
        interpolation = INTERPOLATION[data.INTERPOLATION]
        steps = _middle(data.IMG_SIZE, interpolation) if config.TEST.CROP else _whole(data.IMG_SIZE, interpolation, "")
        return v2.Compose([*steps, v2.PILToTensor()])
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
    return v2.Compose([steps, *([Erasing(aug)] if aug.REPROB > 0 else [])])


def build_mixup(config):
    """Batch transform (images, targets) -> (images, soft targets), or None where mixing is off."""
    aug = config.AUG
    choices = [kind(alpha=alpha, num_classes=config.MODEL.NUM_CLASSES) for kind, alpha in
               ((v2.MixUp, aug.MIXUP), (v2.CutMix, aug.CUTMIX)) if alpha > 0]  # fmt: skip
    if not choices or aug.MIXUP_PROB == 0:
        return None
    weights = [1 - aug.MIXUP_SWITCH_PROB, aug.MIXUP_SWITCH_PROB] if len(choices) == 2 else None
    mix = v2.RandomChoice(choices, p=weights)
    return v2.RandomApply([mix], p=aug.MIXUP_PROB)
