"""PIL image -> normalised tensor [3, S, S], with augmentation for training."""

import torchvision_shim  # noqa: F401  (before torchvision)

import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

INTERPOLATION = {"bicubic": v2.InterpolationMode.BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}


def resized_side(config):
    """Side in pixels to which an X-ray is resized before it is cropped."""
    return int(config.DATA.IMG_SIZE * 8 / 7)


def _eval_steps(size, interpolation, crop):
    if crop:
        return [v2.Resize(int(size * 8 / 7), interpolation), v2.CenterCrop(size)]
    return [v2.Resize((size, size), interpolation)]


def _tensor_steps(mean, std):
    return [v2.PILToTensor(), v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def radiograph_transform(config, train):
    """For X-rays, grey or RGB: crop, flip if asked, brightness and contrast if asked, random erasing."""
    aug, size, interpolation = config.AUG, config.DATA.IMG_SIZE, INTERPOLATION[config.DATA.INTERPOLATION]
    if not train:
        steps = _eval_steps(size, interpolation, config.TEST.CROP) + _tensor_steps(aug.MEAN, aug.STD)
        return v2.Compose(steps)
    # Squeezed to a square first, as at test time: crops of the original would train on other proportions,
    # and the heart's relative width is itself a sign. Hence the narrow range of ratios, too.
    steps = [
        v2.Resize((resized_side(config),) * 2, interpolation),
        v2.RandomResizedCrop(size, scale=tuple(aug.CROP_SCALE), ratio=(0.9, 1.1), interpolation=interpolation),
    ]
    if aug.HFLIP > 0:
        steps.append(v2.RandomHorizontalFlip(aug.HFLIP))
    if aug.COLOR_JITTER > 0:
        steps.append(v2.ColorJitter(brightness=aug.COLOR_JITTER, contrast=aug.COLOR_JITTER))
    steps += _tensor_steps(aug.MEAN, aug.STD)
    if aug.REPROB > 0:
        steps.append(RandomErasing(aug.REPROB, mode=aug.REMODE, max_count=aug.RECOUNT, device="cpu"))
    return v2.Compose(steps)


def photo_transform(config, train):
    """For photographs: timm's ImageNet recipe, as the published models were trained."""
    aug, data = config.AUG, config.DATA
    if not train:
        interpolation = INTERPOLATION[data.INTERPOLATION]
        return v2.Compose(
            _eval_steps(data.IMG_SIZE, interpolation, config.TEST.CROP) + _tensor_steps(aug.MEAN, aug.STD)
        )
    return create_transform(
        data.IMG_SIZE,
        is_training=True,
        scale=tuple(aug.CROP_SCALE),
        hflip=aug.HFLIP,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=aug.AUTO_AUGMENT or None,
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
        re_count=aug.RECOUNT,
        interpolation=data.INTERPOLATION,
        mean=tuple(aug.MEAN),
        std=tuple(aug.STD),
    )


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
