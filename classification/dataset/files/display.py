"""Stored values of a DICOM -> grayscale uint8 in which bright means dense, by one of two recipes. Runs without torch.

`window` is the display pipeline of the standard (PS3.4, annex N), in this order:

    stored value -> modality LUT or rescale    `_modality`   PS3.3 C.11.1
                 -> VOI LUT, window or range   `_voi`        PS3.3 C.11.2
                 -> 0 to 255
                 -> inverted for MONOCHROME1
                 -> padding black              `_padding`    PS3.3 C.7.5.1.1.2

Unusable elements of the header are left out with a warning (`warnings.warn`), which the caller collects.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from pydicom.sequence import Sequence

from dataset.files.codestreams import Unusable

FEW = 65536  # stored values up to which a table is worked out: all that 16 bits have
BLOCK = 40_000  # pixels taken at a time: they stay in the cache, and the memory is bounded
LARGEST = 1e30  # of a number in the header: beyond it float64 overflows on the way


def window(stored, dataset, index):
    """The image as it is displayed by its header.

    The whole output of the window or table becomes 0 to 255, so that a wide window stays wide; without one, the
    image's own range does. Padding is left out of that range and becomes black.

    Args:
        stored: integers [H, W].
        dataset: the header, a pydicom Dataset.
        index: which of several VOI LUTs or windows; if it is not valid, the first valid one.
    """
    padding = _padding(stored, dataset)
    seen = stored if padding is None else stored[~padding]
    low, high = int(seen.min()), int(seen.max())
    modality = _modality(dataset)
    voi = _voi(dataset, index, modality.negative)
    if voi is None:
        ends = modality.values(np.array([low, high]) if modality.straight else np.unique(seen))
        voi = _ramp(ends.min(), ends.max())
    inverted = is_inverted(dataset)

    def grey(values):
        levels = np.round(255 * voi(modality.values(values))).astype(np.uint8)
        return 255 - levels if inverted else levels

    image = _each_value_once(grey, stored, low, high)
    if padding is not None:
        image[padding] = 0
    return image


def mimic_jpg(stored, dataset, _index):
    """How the JPG release of MIMIC-CXR was made: stored values to 0..255, inversion, histogram equalisation.

    No rescale, no window, no padding: the release used none (MIMIC-CXR-JPG documentation; the
    equalisation is OpenCV's equalizeHist).
    """
    low, high = int(stored.min()), int(stored.max())
    inverted = is_inverted(dataset)

    def level(values):
        levels = ((values.astype(np.float64) - low) / max(high - low, 1) * 255).astype(np.uint8)
        return 255 - levels if inverted else levels

    image = Image.fromarray(_each_value_once(level, stored, low, high))
    histogram = np.array(image.histogram())
    lowest = histogram[np.flatnonzero(histogram)[0]]
    if lowest < stored.size:
        equal = np.round((np.cumsum(histogram) - lowest) * (255 / (stored.size - lowest))).clip(0, 255)
        image = image.point(equal.astype(int).tolist())
    return np.asarray(image)


RECIPES = {"window": window, "mimic_jpg": mimic_jpg}


def photometric(dataset):
    return str(dataset.get("PhotometricInterpretation") or "").strip(" \0").upper()


def is_inverted(dataset):
    """Inverted by this tag alone: PresentationLUTShape only repeats it (PS3.3 C.8.11.3.1.2)."""
    return photometric(dataset) == "MONOCHROME1"


def _each_value_once(grey, stored, low, high):
    """grey(values) -> uint8 for every pixel, computed once per stored value if these are few.

    A quarter of the time of computing it for each pixel. Values outside low to high (padding) become anything.
    """
    image = np.empty(stored.shape, np.uint8)
    pixels, out = stored.reshape(-1), image.reshape(-1)
    few = high - low < FEW
    if few:
        table = grey(np.arange(low, high + 1))
        # Unsigned differences: they wrap, and so are right for signed values, too.
        first = np.array(low, stored.dtype).view(f"u{stored.itemsize}")
        pixels = pixels.view(first.dtype)
    for k in range(0, len(pixels), BLOCK):
        block = slice(k, k + BLOCK)
        if few:
            np.take(table, pixels[block] - first, out=out[block], mode="clip")
        else:
            out[block] = grey(pixels[block])
    return image


# ------------------------------------------------------------------------------- the stages of the pipeline
def _padding(stored, dataset):
    """Which pixels are padding, bool [H, W]; None where the header names none."""
    ends = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    ends = [_in_range_of_pixels(end, dataset) for end in ends if end is not None]
    if None in ends:
        warnings.warn(f"PixelPaddingValue {dataset.PixelPaddingValue} is no value that a pixel can have", stacklevel=2)
        return None
    padding = (stored >= min(ends)) & (stored <= max(ends))
    if padding.all():
        raise Unusable("all pixels are padding")
    return padding


def _in_range_of_pixels(value, dataset):
    """A value of the header in the signedness of the pixels: 32768 is -32768 in 16 signed bits, and the reverse.

    Some writers do so in the bits allocated, some in those stored. None: no pixel can have the value.
    """
    signed = dataset.get("PixelRepresentation") == 1
    stored = int(dataset.BitsStored)
    least = -(1 << stored - 1) if signed else 0
    for bits in (int(dataset.BitsAllocated), stored):
        if -(1 << bits - 1) <= int(value) < 1 << bits:
            same = int(value) % (1 << bits)
            same -= (signed and same >> bits - 1) << bits
            if least <= same < least + (1 << stored):
                return same
    return None


class Modality(NamedTuple):
    """The first stage."""

    values: Callable  # stored values -> modality values, float64
    straight: bool  # along a line, so that the ends of one range are those of the other
    negative: bool  # whether modality values may be negative


def _modality(dataset):
    signed = dataset.get("PixelRepresentation") == 1
    for item in _items(dataset, "ModalityLUTSequence"):
        if table := _lut(item, signed):
            first, entries, _ = table
            return Modality(lambda values: _look_up(entries, values.astype(np.int64) - first), False, False)
    slope = next(iter(_numbers(dataset, "RescaleSlope")), 1.0)
    intercept = next(iter(_numbers(dataset, "RescaleIntercept")), 0.0)
    if not (0 < abs(slope) <= LARGEST and abs(intercept) <= LARGEST):
        warnings.warn(f"RescaleSlope {slope} with RescaleIntercept {intercept} is no scale: left out", stacklevel=2)
        slope, intercept = 1.0, 0.0
    return Modality(lambda values: values * slope + intercept, True, signed or slope < 0 or intercept < 0)


def _voi(dataset, index, negative):
    """Modality values -> 0 to 1, by the VOI LUT or window `index`, or else the first that is valid; None without one.

    negative: whether a modality value may be below 0.
    """
    tables = {k: table for k, item in enumerate(_items(dataset, "VOILUTSequence")) if (table := _lut(item, negative))}
    if tables:
        first, entries, bits = _chosen(tables, index)
        # A table is looked up by whole numbers; rescaling makes others.
        return lambda values: _look_up(entries, np.round(values) - first) / (2**bits - 1)
    windows = _windows(dataset)
    if not windows:
        if index:
            text = f"window {index} is missing, and so is any other: the image's own range is used"
            warnings.warn(text, stacklevel=2)
        return None
    center, width = _chosen(windows, index)
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip(" \0").upper()
    if function == "SIGMOID":

        def sigmoid(values):
            with np.errstate(over="ignore"):
                return 1 / (1 + np.exp(-4 * (values - center) / width))

        return sigmoid
    if function == "LINEAR_EXACT" or (function == "LINEAR" and width < 1):
        return _ramp(center - width / 2, center + width / 2)
    if function != "LINEAR":
        warnings.warn(f"VOILUTFunction {function!r} is unknown: taken for LINEAR", stacklevel=2)
    return _ramp(center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


def _chosen(valid, index):
    """The VOI LUT or window `index` of those that are valid, or else their first, and a warning."""
    first = min(valid)
    if index not in valid:
        warnings.warn(f"window {index} is missing or not valid: window {first} is used", stacklevel=2)
    return valid.get(index, valid[first])


def _ramp(low, high):
    """0 up to `low`, 1 above `high`, a straight line between; without a line (width 1) a step."""
    if high > low:
        return lambda values: ((values - low) / (high - low)).clip(0, 1)
    return lambda values: (values > low).astype(np.float64)


# ---------------------------------------------------------------------------------- the header
# Read from the bytes of the elements: pydicom refuses some of what is readable, such as a decimal comma.
def _items(dataset, name):
    value = dataset.get(name)
    return list(value) if isinstance(value, Sequence) else []


def _numbers(dataset, name):
    """Values of an element as floats, NaN for one that is no number; none where it is absent or empty."""
    element = dataset.get_item(name)
    if element is None or not element.value:
        return []
    if element.VR in ("FL", "FD", "US", "SS", "UL", "SL"):  # not the standard's, but clear
        return [float(value) for value in np.atleast_1d(dataset[name].value)]
    texts = element.value.decode("latin-1").strip(" \0").split("\\")
    return [_number(text) for text in texts] if texts != [""] else []


def _number(text):
    try:
        value = float(text.strip(" \0").replace(",", "."))
    except ValueError:
        return math.nan
    return value if abs(value) <= LARGEST else math.nan


def _windows(dataset):
    """Number of the window -> (center, width), those that are valid."""
    centers, widths = (_numbers(dataset, name) for name in ("WindowCenter", "WindowWidth"))
    pairs = {k: pair for k, pair in enumerate(zip(centers, widths)) if not math.isnan(pair[0]) and pair[1] > 0}
    if pairs or not (centers or widths):
        return pairs
    centers, widths = [c for c in centers if not math.isnan(c)], [w for w in widths if w > 0]
    if len(centers) == len(widths) == 1:  # one number each, beside values that are none
        return {0: (centers[0], widths[0])}
    warnings.warn("WindowCenter and WindowWidth are no pair of numbers: left out", stacklevel=2)
    return {}


def _lut(item, signed):
    """(first value mapped, entries float64 [count], bits of an entry) of an item with a lookup table, or None.

    signed: whether the values that it is looked up by can be negative.
    """
    descriptor, data = (getattr(item.get_item(name), "value", None) for name in ("LUTDescriptor", "LUTData"))
    if not descriptor or not data:
        return None
    order = "<" if item.original_encoding[1] else ">"
    if len(descriptor) >= 6:
        count, first, bits = (int(value) for value in np.frombuffer(descriptor, f"{order}u2", 3))
        count = count or 65536  # which 16 bits do not hold
        if len(data) >= 2 * count:
            entries = np.frombuffer(data, f"{order}u2", count)
        elif len(data) in (count, count + count % 2):  # entries of 8 bits, two in a word
            entries, bits = np.frombuffer(data, f"{order}u2", len(data) // 2).astype("<u2").view(np.uint8)[:count], 8
        else:
            entries = None
    if len(descriptor) < 6 or entries is None:
        warnings.warn("LUTDescriptor and LUTData do not agree: the lookup table is left out", stacklevel=2)
        return None
    if first >= 32768 and signed:  # an unsigned number to numpy, and to some writers
        first -= 65536
    needed = int(entries.max()).bit_length()
    if not needed <= bits <= 16 or (bits == 16 and needed <= 12):
        warnings.warn("LUTDescriptor states other bits than the entries need: the entries are believed", stacklevel=2)
        bits = max(needed, 8)
    return first, entries.astype(np.float64), bits


def _look_up(entries, index):
    """Below the table its first entry, above it the last."""
    return entries[np.clip(index, 0, len(entries) - 1).astype(np.intp)]
