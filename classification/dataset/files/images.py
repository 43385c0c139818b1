"""Image file -> grey uint8 array [H, W] in which bright means dense. Runs without torch.

The content of a file decides its format, never its name. DICOM values become grey by one of two recipes
(:data:`dataset.files.dicom.RECIPES`), pictures are turned upright. Every fault of a file is an :class:`ImageError` that
names the file; what was read although something is odd is collected for :func:`take_warnings`.
"""

import io
import re
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.errors import UserError
from dataset.files.codestreams import Unusable, check_png, check_size, read_jpeg
from dataset.files.dicom import begins_as_dicom, decode_dicom

Image.MAX_IMAGE_PIXELS = None  # check_size is stricter, and an error, not a warning

# The endings of image files, which only help to find them: the content decides the format. Some files have none.
ENDINGS = {"jpg": (".jpg", ".jpeg"), "dcm": (".dcm", ".dicom"), "png": (".png",), "tif": (".tif", ".tiff")}
OTHER_ENDINGS = (".bmp", ".webp", ".jp2", ".pgm")  # which Pillow reads as well
_LOWER = (*sum(ENDINGS.values(), ()), *OTHER_ENDINGS)
SUFFIXES = (*_LOWER, *map(str.upper, _LOWER), "")
# How a file of a format begins; TIFF, and BigTIFF, in either byte order. For DICOM see `begins_as_dicom`.
BEGINNINGS = {
    "jpg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG",),
    "tif": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}

# EXIF orientation -> how a picture is turned upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PHOTOMETRIC = 262  # tag of a TIFF; 0: white is zero
# What lies there instead of an image, by how it begins.
NO_IMAGES = (
    (b"version https://git-lfs", "a pointer of Git LFS, fetch the file itself with `git lfs pull`"),
    (b"<", "a web page or XML, such as the answer to a download without login"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"PK", "a zip file"),
)


class ImageError(UserError):
    """An image that cannot be used; the text names the file and the fault."""


def sniff(data):
    """The format of a file by how it begins, one of ENDINGS; empty for any other."""
    if begins_as_dicom(data):
        return "dcm"
    return next((kind for kind, starts in BEGINNINGS.items() if data.startswith(starts)), "")


def orientation(picture):
    """EXIF orientation of a PIL picture, 1 (upright) to 8; 1 where it has none that can be read."""
    try:
        value = picture.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block, by whatever it breaks: the pixels are not concerned
        return 1
    return value if value in UPRIGHT else 1


CLIPPED = 0.1  # percent of the pixels at either end: a hot pixel does not decide how bright the others are


def _to_uint8(values):
    """Any numeric array, its percentiles CLIPPED and 100 - CLIPPED to 0 and 255; its ends where these are equal.

    How many of its bits are used a picture does not say: 16-bit PNGs hold 12 bits, say, or a part of them.
    """
    values = values.astype(np.float32)
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise Unusable("some pixels are not finite numbers")
    inner = np.percentile(values, (CLIPPED, 100 - CLIPPED), method="nearest")
    low, high = inner if inner[0] < inner[1] else (low, high)
    return np.round(((values - low) * (255.0 / max(high - low, 1e-12))).clip(0, 255)).astype(np.uint8)


def _decode_picture(data, shrink_to):
    check = {"jpg": read_jpeg, "png": check_png}.get(sniff(data))
    if check:  # whether it is whole, before Pillow reads it
        check(data)
    with Image.open(io.BytesIO(data)) as image:
        check_size(image.height, image.width)
        # A JPEG decodes at 1/2, 1/4 or 1/8 in a fraction of the time; no effect on others.
        if shrink_to and (factor := min(image.size) / shrink_to) >= 2:
            image.draft("L", (int(image.width / factor), int(image.height / factor)))
        image.load()  # which turns a TIFF itself
        turn = UPRIGHT.get(orientation(image))
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            levels = _to_uint8(np.asarray(image))
            if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # Pillow inverts those of 8 bits only
                levels = 255 - levels
            grey = Image.fromarray(levels)
        else:
            grey = image.convert("L")
        return np.asarray(grey if turn is None else grey.transpose(turn))


def decode(data, name, *, recipe="window", window=0, shrink_to=0):
    """Bytes of a JPG, PNG or DICOM file (or any other that Pillow reads) -> uint8 [H, W].

    name: of the file, for messages.
    recipe, window: for DICOM, one of `RECIPES`, and which window or VOI LUT where there are several
    (the first valid one where that one is not there or not valid).
    shrink_to: a larger image may be reduced by a whole factor, to a short side of at least this; 0: never.

    ImageError: empty, cut short, damaged, not an image, no pixels, or a syntax that cannot be decoded.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if not data:
                raise ValueError("the file is empty")
            dicom = sniff(data) == "dcm"
            grey = decode_dicom(data, recipe, window) if dicom else _decode_picture(data, shrink_to)
            if shrink_to and (factor := min(grey.shape) // shrink_to) > 1:  # means over blocks of whole pixels
                grey = np.asarray(Image.fromarray(grey).reduce(factor))
    except Unusable as error:
        raise ImageError(f"{name}: cannot be read as an image ({error})") from error
    except MemoryError as error:
        raise ImageError(f"{name}: there is not enough memory to read it") from error
    # Decoders raise whatever they meet (OSError, struct.error, KeyError, RuntimeError, ...): to the
    # user all of it means that this file is broken.
    except Exception as error:
        raise ImageError(f"{name}: cannot be read as an image ({_reason(error, data)}); replace the file") from error
    for warning in caught:
        note(str(warning.message), name)
    return grey


def decode_photo(data, name):
    """Bytes of a photograph -> PIL image RGB; the errors are those of :func:`decode`."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # as above
        raise ImageError(f"{name}: cannot be read as an image ({_reason(error, data)}); replace the file") from error


def _reason(error, data):
    """One line, without what means nothing to the user, such as an object's address."""
    if isinstance(error, UnidentifiedImageError):
        what = next((what for start, what in NO_IMAGES if data[:1000].lstrip().startswith(start)), "")
        if not data.strip(b"\0"):
            what = "zeros, as of a download that was not finished"
        return f"cannot identify image: neither JPG, PNG nor DICOM{what and ', but '}{what}"
    text = str(error).split("\n")[0]
    return re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the file", text) or type(error).__name__


# ------------------------------------------------------------------------------------- warnings, once a kind
_warnings = {}  # of this process: kind -> [how often, first text, file of it]


def warning_kind(text):
    """Texts that differ in values alone are of one kind."""
    return re.sub(r"'[^']*'|-?\d[\d.e+-]*", "#", text)


def note(text, name, count=1):
    _warnings.setdefault(warning_kind(text), [0, text, name])[0] += count


def take_warnings():
    """What this process has warned of since the last call: [(how often, the first text, the file of that one)]."""
    taken = [tuple(seen) for seen in _warnings.values()]
    _warnings.clear()
    return taken
