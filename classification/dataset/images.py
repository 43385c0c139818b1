"""Image file -> grey uint8 array [H, W] in which bright means dense. Runs without torch.

DICOM values become grey by one of two recipes (`RECIPES`). Every fault of a file is an
:class:`ImageError` that names the file.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.dicom import check_size, decode_dicom
from errors import UserError

Image.MAX_IMAGE_PIXELS = None  # check_size is stricter, and an error, not a warning

# How files of each suffix begin (DICOM: after 128 bytes of anything).
SUFFIXES_BY_CONTENT = ((b"DICM", ".dcm"), (b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"))


class ImageError(UserError):
    """An image that cannot be used; the text names the file and the fault."""


def _to_uint8(values):
    """Any numeric array, its own minimum and maximum to 0 and 255."""
    values = values.astype(np.float32)
    low, high = values.min(), values.max()
    return np.round((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)


def _decode_picture(data, shrink_to):
    with Image.open(io.BytesIO(data)) as image:
        check_size(image.height, image.width)
        if shrink_to:  # a JPEG decodes at 1/2, 1/4 or 1/8 in a fraction of the time; no effect on others
            factor = min(image.size) / shrink_to
            if factor >= 2:
                image.draft("L", (int(image.width / factor), int(image.height / factor)))
        image.load()
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _to_uint8(np.asarray(image))
        return np.asarray(image.convert("L"))


def _reduce(grey, shrink_to):
    """Means over blocks of whole pixels, as large as leaves the short side at least `shrink_to`."""
    factor = min(grey.shape) // shrink_to if shrink_to else 1
    return grey if factor < 2 else np.asarray(Image.fromarray(grey).reduce(factor))


def decode(data, name, *, recipe="window", window=0, shrink_to=0):
    """Bytes of a JPG, PNG or DICOM file -> uint8 [H, W]; the format is told from `name`'s suffix.

    recipe, window: for DICOM, one of `RECIPES`, and which window or VOI LUT where there are several
    (the first valid one where that one is not there or not valid).
    shrink_to: a larger image may be reduced by a whole factor, to a short side of at least this; 0: never.

    Raises:
        ImageError: empty, truncated, not an image, no pixels, or a syntax that cannot be decoded.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        if Path(name).suffix.lower() == ".dcm":
            return _reduce(decode_dicom(data, recipe, window), shrink_to)
        return _reduce(_decode_picture(data, shrink_to), shrink_to)
    # Decoders raise whatever they meet (OSError, struct.error, KeyError, RuntimeError, ...): to the
    # user all of it means that this file is broken.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"{name}: cannot be read as an image ({reason}); replace the file") from error
