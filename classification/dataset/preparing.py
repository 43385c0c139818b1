"""An X-ray as evaluation prepares it: PIL image -> uint8 square -> the floats that the model takes.

It needs torch alone: torchvision and timm take longer to import than sixty X-rays to predict.
"""

import numpy as np
import torch
from torch.nn import functional as F


def normalize(images, mean, std):
    """uint8 [N, 1 or 3, S, S] -> float32 [N, 3, S, S] of (value / 255 - mean) / std, on the device of `images`."""
    mean, std = (torch.as_tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - mean) / std


def resized_side(size):
    """Side in pixels to which an image is resized before a crop of `size` is taken."""
    return int(size * 8 / 7)


def decoding(config):
    """How files become grayscale: the keywords of `dataset.files.images.decode`."""
    # Resizing then has four pixels or more for each of its own.
    shrink_to = 2 * resized_side(config.DATA.IMG_SIZE)
    return {"recipe": config.DATA.DICOM_RECIPE, "window": config.DATA.DICOM_WINDOW, "shrink_to": shrink_to}


class Square:
    """The whole X-ray as a square of `side` pixels, of which the middle `size` are kept.

    A tensor from the start: torch resizes uint8 twice as fast as Pillow, to within one gray level of it.

    Args:
        interpolation: bicubic or bilinear, both with antialias.
        resize: squeeze, or pad: the aspect is kept, and black is added on both sides.
    """

    def __init__(self, side, size, interpolation, resize):
        self.side, self.size, self.interpolation, self.resize = side, size, interpolation, resize

    def __call__(self, image):
        """PIL image, L or RGB -> uint8 [1 or 3, size, size]."""
        pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)
        height = width = self.side
        if self.resize == "pad":
            longest = max(image.size)
            height, width = (max(1, int(self.side * n / longest)) for n in (image.height, image.width))
        if pixels.shape[1:] != (height, width):
            pixels = F.interpolate(
                pixels[None], (height, width), mode=self.interpolation, align_corners=False, antialias=True
            )[0]
        left, top = (self.side - width) // 2, (self.side - height) // 2
        pixels = F.pad(pixels, (left, self.side - width - left, top, self.side - height - top))
        first = round((self.side - self.size) / 2)
        return pixels[:, first : first + self.size, first : first + self.size].contiguous()


def evaluation_transform(config):
    """The :class:`Square` of validation, test and prediction."""
    data = config.DATA
    side = resized_side(data.IMG_SIZE) if config.TEST.CROP else data.IMG_SIZE
    return Square(side, data.IMG_SIZE, data.INTERPOLATION, data.RESIZE)


def placement(config, height, width):
    """What part of an X-ray of so many pixels the model sees, without augmentation: left, top, right, bottom.

    In pixels of the X-ray; beyond its border where `DATA.RESIZE pad` adds black.
    """
    size = config.DATA.IMG_SIZE
    part = size / resized_side(size) if config.TEST.CROP else 1
    if config.DATA.RESIZE == "squeeze":
        across, down = part * width, part * height
    else:
        across = down = part * max(height, width)
    return (width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2
