"""DICOM file -> grey uint8 array [H, W] in which bright means dense, by one of two recipes. Runs without torch.

Every fault is a ValueError, or whatever pydicom raises; `dataset.images.decode` names the file.
"""

import io
import struct

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import UID

MAX_PIXELS = 100_000_000  # a chest X-ray has about 10 million; more is a broken header or a bomb

# Deflated files are refused: 261 kB of them can inflate to 268 MB.
TRANSFER_SYNTAXES = {
    "1.2.840.10008.1.2": "Implicit VR Little Endian",
    "1.2.840.10008.1.2.1": "Explicit VR Little Endian",
    "1.2.840.10008.1.2.2": "Explicit VR Big Endian",
    "1.2.840.10008.1.2.4.50": "JPEG Baseline",
    "1.2.840.10008.1.2.4.51": "JPEG Extended",
    "1.2.840.10008.1.2.4.57": "JPEG Lossless",
    "1.2.840.10008.1.2.4.70": "JPEG Lossless SV1",
    "1.2.840.10008.1.2.4.80": "JPEG-LS Lossless",
    "1.2.840.10008.1.2.4.81": "JPEG-LS Near Lossless",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 Lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.5": "RLE Lossless",
}


def check_size(height, width):
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"the header says {height} x {width} pixels; at most {MAX_PIXELS:,} are read")


def _usable(dataset, index):
    """Which VOI LUT or window to apply: number `index`, or else the first that is valid; None without one."""
    if "VOILUTSequence" in dataset:
        return index if index < len(dataset.VOILUTSequence) else 0
    widths = np.atleast_1d(np.asarray(dataset.get("WindowWidth") or [], float))
    centers = np.atleast_1d(np.asarray(dataset.get("WindowCenter") or [], float))
    # PS3.3 C.11.2.1.2: a width is at least 1 (LINEAR), or above 0.
    least = 1 if dataset.get("VOILUTFunction", "LINEAR") == "LINEAR" else np.finfo(float).tiny
    valid = [k for k in range(min(len(widths), len(centers))) if widths[k] >= least]
    return index if index in valid else next(iter(valid), None)


def _look_up(grey, stored, low):
    """grey[stored - low] for every pixel; what lies out of the table (padding) takes its ends."""
    if low < 0:
        stored = stored - np.int32(low)
    else:
        grey = np.concatenate([np.full(low, grey[0]), grey])
    image = np.empty(stored.shape, np.uint8)
    for k in range(0, len(stored), 16):  # a few rows at a time stay in the cache: half the time of grey[stored]
        np.take(grey, stored[k : k + 16], out=image[k : k + 16], mode="clip")
    return image


def _window(stored, dataset, index):
    """The display pipeline of DICOM (PS3.4, annex N): modality LUT or rescale, then VOI LUT or window.

    The output range of the window or table becomes 0 to 255, so that a wide window stays wide;
    without one, the image's own range does. Padding is left out of the range and becomes black.
    """
    seen, padding = stored, None
    if dataset.get("PixelPaddingValue") is not None:
        ends = dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue)
        padding = (stored >= min(ends)) & (stored <= max(ends))
        if padding.all():
            raise ValueError("all pixels are padding")
        seen = stored[~padding]
    low, high = int(seen.min()), int(seen.max())
    # Worked out once for each stored value, not for each pixel: a quarter of the time, in float64.
    values = apply_modality_lut(np.arange(low, high + 1), dataset).astype(np.float64)
    k = _usable(dataset, index)
    if k is None:
        ends = values.min(), values.max()
    elif "VOILUTSequence" in dataset:
        item = dataset.VOILUTSequence[k]
        count, first = item.LUTDescriptor[0] or 65536, item.LUTDescriptor[1]
        table = apply_voi_lut(np.arange(first, first + count, dtype=np.int32), dataset, k)
        ends = int(table.min()), int(table.max())
        # A table is looked up by whole numbers; rescaling makes floats.
        values = apply_voi_lut(np.round(values).astype(np.int32), dataset, k).astype(np.float64)
    else:
        with np.errstate(over="ignore"):  # the lower end of a SIGMOID is 1 / exp(large)
            ends = apply_voi_lut(np.array([-1e9, 1e9]), dataset, k)
        values = apply_voi_lut(values, dataset, k)
    span = max(ends[1] - ends[0], 1e-12)
    grey = np.round((values - ends[0]) * (255 / span)).astype(np.uint8)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    image = _look_up(grey, stored, low)
    if padding is not None:
        image[padding] = 0
    return image


def _mimic_jpg(stored, dataset, _index):
    """How the JPG release of MIMIC-CXR was made: stored values to 0..255, inversion, histogram equalisation.

    No rescale, no window, no padding: the release used none (MIMIC-CXR-JPG documentation; the
    equalisation is OpenCV's equalizeHist).
    """
    low, high = int(stored.min()), int(stored.max())
    levels = (np.arange(high - low + 1) / max(high - low, 1) * 255).astype(np.uint8)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        levels = 255 - levels
    grey = _look_up(levels, stored, low)
    histogram = np.bincount(grey.ravel(), minlength=256)
    lowest = histogram[np.flatnonzero(histogram)[0]]
    if lowest == grey.size:
        return grey
    table = np.round((np.cumsum(histogram) - lowest) * (255 / (grey.size - lowest))).clip(0, 255).astype(np.uint8)
    return table[grey]


def _compressed_size(frame, syntax):
    """(height, width) that a compressed frame says it has: a decoder makes room for that, whatever the DICOM says."""
    if syntax.startswith("1.2.840.10008.1.2.4.9"):  # JPEG 2000 (ISO 15444-1, annex A): the marker SIZ
        start = frame.index(b"\xff\x4f\xff\x51")
        return tuple(reversed(struct.unpack_from(">II", frame, start + 8)))
    position = 2  # JPEG (ISO 10918-1, annex B) and JPEG-LS: segments up to the start of frame
    while True:
        marker, length = struct.unpack_from(">xBH", frame, position)
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", frame, position + 5)
        else:
            position += 2 + length


RECIPES = {"window": _window, "mimic_jpg": _mimic_jpg}


def decode_dicom(data, recipe, window):
    # The transfer syntax first: reading on would inflate a deflated file.
    file = io.BytesIO(data)
    read_preamble(file, force=False)
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2)
    syntax = UID(meta.get("TransferSyntaxUID", ""))
    if syntax not in TRANSFER_SYNTAXES:
        raise ValueError(f"transfer syntax {syntax.name or 'missing'} is not supported")
    dataset = pydicom.dcmread(io.BytesIO(data))
    for tag in ("Rows", "Columns", "PixelData"):
        if tag not in dataset:
            raise ValueError(f"the DICOM has no {tag}")
    check_size(dataset.Rows, dataset.Columns)
    if int(dataset.get("NumberOfFrames") or 1) != 1 or dataset.get("SamplesPerPixel", 1) != 1:
        raise ValueError("the DICOM is not a single grey image")
    photometric = dataset.get("PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"PhotometricInterpretation is {photometric!r}; expected MONOCHROME1 or MONOCHROME2")
    if syntax.startswith("1.2.840.10008.1.2.4."):
        size = _compressed_size(get_frame(dataset.PixelData, 0, number_of_frames=1), syntax)
        if size != (dataset.Rows, dataset.Columns):
            raise ValueError(f"the pixels are {size}, the header says {(dataset.Rows, dataset.Columns)}")
    # Inverted once, by this tag alone: PresentationLUTShape only repeats it (PS3.3 C.8.11.3.1.2).
    return RECIPES[recipe](dataset.pixel_array, dataset, window)
