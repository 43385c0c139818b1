"""Images: the display pipeline of DICOM against the formulas of the standard, and every damage and oddity of a file."""

import io
import math
import mmap
import os
import resource
import signal
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace as Node

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from conftest import SHARED
from dataset.files.dicom import MAX_PIXELS
from dataset.files.domain import domain_warning, image_domain
from dataset.files.images import ImageError, decode, sniff, take_warnings
from dataset.files.stores import FileStore
from dicom_writer import BIG_ENDIAN, EXPLICIT, IMPLICIT, encapsulated, encode, image, items, lut


def jpg(array, **save):
    data = io.BytesIO()
    Image.fromarray(array).save(data, "JPEG", **save)
    return data.getvalue()


def dicom(pixels, **tags):
    """Bytes of an uncompressed DICOM of uint16 [H, W]."""
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"
    ds.PhotometricInterpretation, ds.SamplesPerPixel = "MONOCHROME2", 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = io.BytesIO()
    pydicom.dcmwrite(data, ds, enforce_file_format=True)
    return data.getvalue()


RAMP = np.arange(24, dtype=np.uint16).reshape(4, 6) * 100


def test_dicom_order_of_operations():
    """Rescale, then window, then inversion, each once."""
    plain = decode(dicom(RAMP), "a.dcm")
    assert plain.dtype == np.uint8 and plain.min() == 0 and plain.max() == 255
    np.testing.assert_array_equal(plain, np.round(RAMP / RAMP.max() * 255))
    np.testing.assert_array_equal(decode(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"), "a.dcm"), 255 - plain)
    windowed = decode(dicom(RAMP, WindowCenter=1000, WindowWidth=400), "a.dcm")
    assert (windowed[RAMP <= 800] == 0).all() and (windowed[RAMP >= 1200] == 255).all()
    rescaled = dict(RescaleSlope=0.5, RescaleIntercept=-100, WindowCenter=400, WindowWidth=200)
    np.testing.assert_array_equal(decode(dicom(RAMP, **rescaled), "a.dcm"), windowed)


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"WindowCenter": 900, "WindowWidth": 700},
        {"WindowCenter": 900, "WindowWidth": 700, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 900, "WindowWidth": 700, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 100, "WindowWidth": 300, "RescaleSlope": 0.25, "RescaleIntercept": -50},
    ],
    ids=["none", "linear", "sigmoid", "exact", "rescaled"],
)
def test_windowing_is_that_of_pydicom_in_float64(tags, signed):
    """pydicom's own pipeline on every pixel; the range of the window's output is 0 to 255."""
    pixels = RAMP.astype(np.int16) - 1000 * signed
    data = dicom(pixels, PixelRepresentation=signed, **tags)
    ds = pydicom.dcmread(io.BytesIO(data))
    values = apply_voi_lut(apply_modality_lut(ds.pixel_array.astype(np.float64), ds), ds)
    low, high = (-32768, 32767) if signed else (0, 65535)
    if "RescaleSlope" in tags:
        low, high = low * 0.25 - 50, high * 0.25 - 50
    if not tags:
        low, high = values.min(), values.max()
    expected = (values - low) / (high - low) * 255
    assert np.abs(decode(data, "a.dcm") - expected).max() <= 0.5 + 1e-6


def test_window_choice_and_padding():
    def grey(window=0, **tags):
        return decode(dicom(RAMP, **tags), "a.dcm", window=window)

    wide, narrow = grey(WindowCenter=1000, WindowWidth=8000), grey(WindowCenter=1000, WindowWidth=200)
    assert wide.max() - wide.min() < 80  # a wide window is not stretched again
    both = dict(WindowCenter=[1000, 1000], WindowWidth=[8000, 200])
    np.testing.assert_array_equal(grey(0, **both), wide)
    np.testing.assert_array_equal(grey(1, **both), narrow)
    np.testing.assert_array_equal(grey(7, **both), wide)
    np.testing.assert_array_equal(grey(WindowCenter=[5, 1000], WindowWidth=[0, 200]), narrow)  # width 0 is not valid
    np.testing.assert_array_equal(grey(WindowCenter=5, WindowWidth=0), grey())

    padded = RAMP.copy()
    padded[0] = 60000
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        tags = dict(PhotometricInterpretation=photometric)
        image = decode(dicom(padded, PixelPaddingValue=60000, **tags), "a.dcm")
        assert (image[0] == 0).all()
        np.testing.assert_array_equal(image[1:], decode(dicom(RAMP[1:], **tags), "a.dcm"))
    ranged = decode(dicom(padded, PixelPaddingValue=59000, PixelPaddingRangeLimit=61000), "a.dcm")
    np.testing.assert_array_equal(ranged[1:], decode(dicom(RAMP[1:]), "a.dcm"))
    with pytest.raises(ImageError, match="all pixels are padding"):
        decode(dicom(RAMP * 0, PixelPaddingValue=0), "a.dcm")


def test_mimic_jpg_recipe():
    """Worked out by hand: levels 0, 0, 85, 255 hold 2, 1, 1 of 4 pixels, so 0 -> 0, 85 -> 127.5, 255 -> 255."""
    pixels = np.array([[1000, 1000], [1100, 1300]], np.uint16)
    tags = dict(WindowCenter=5, WindowWidth=10, PixelPaddingValue=1000)  # none of which the recipe uses
    grey = decode(dicom(pixels, **tags), "a.dcm", recipe="mimic_jpg")
    np.testing.assert_array_equal(grey, [[0, 0], [128, 255]])
    inverted = decode(dicom(pixels, PhotometricInterpretation="MONOCHROME1"), "a.dcm", recipe="mimic_jpg")
    # 255, 255, 170, 0: the lowest level, 0, has one pixel; (1, 3) of 3 above it.
    np.testing.assert_array_equal(inverted, [[255, 255], [85, 0]])
    assert len(np.unique(decode(dicom(pixels * 0 + 7), "a.dcm", recipe="mimic_jpg"))) == 1


# ------------------------------------------------- the display pipeline against the formulas of PS3.3, pixel by pixel
def linear(x, center, width):  # C.11.2.1.2.1
    if x <= center - 0.5 - (width - 1) / 2:
        return 0.0
    if x > center - 0.5 + (width - 1) / 2:
        return 255.0
    return ((x - (center - 0.5)) / (width - 1) + 0.5) * 255


def sigmoid(x, center, width):  # C.11.2.1.3.1
    exponent = -4 * (x - center) / width
    return 255 / (1 + math.exp(exponent)) if exponent < 700 else 0.0


def linear_exact(x, center, width):  # C.11.2.1.3.2
    if x <= center - width / 2:
        return 0.0
    if x > center + width / 2:
        return 255.0
    return ((x - center) / width + 0.5) * 255


FORMULAS = {"LINEAR": linear, "SIGMOID": sigmoid, "LINEAR_EXACT": linear_exact}


def assert_shows(data, expected, **options):
    """The file shows `expected` [H, W] of floats (or what rounds to it)."""
    grey = decode(data, "a", **options).astype(float)
    expected = np.array(expected, float).reshape(grey.shape)
    worst = np.unravel_index(np.abs(grey - expected).argmax(), grey.shape)
    assert np.abs(grey - expected).max() <= 0.5 + 1e-6, f"{grey[worst]} at {worst}, expected {expected[worst]}"


def window_tags(center, width, function=None, slope=None, intercept=None):
    tags = [("WindowCenter", "DS", f"{center}"), ("WindowWidth", "DS", f"{width}")]
    if function is not None:
        tags.append(("VOILUTFunction", "CS", function))
    if slope is not None:
        tags += [("RescaleSlope", "DS", f"{slope}"), ("RescaleIntercept", "DS", f"{intercept}")]
    return tags


@pytest.mark.parametrize("inverted", [False, True], ids=["monochrome2", "monochrome1"])
@pytest.mark.parametrize("function", FORMULAS)
@pytest.mark.parametrize("signed", [0, 1], ids=["unsigned", "signed"])
@pytest.mark.parametrize(
    "slope, intercept, center, width",
    [
        (1, 0, 0, 1000),  # a center of 0 is a value, not an absence
        (1, 0, 900, 700),
        (-10, 3000, 500, 9000),
        (-1, 0, -1000, 1500),
        (0.25, -50, 100, 300),
        (1e-3, 0, 0.9, 0.7),  # LINEAR is only defined from 1 on: as LINEAR_EXACT
        (1, -1024, 0, 1),
        (3, 0, 2000, 1e6),
        (0, 7, 900, 700),  # no scale: left out
    ],
)
def test_windows_are_those_of_the_standard(slope, intercept, center, width, signed, function, inverted):
    values = np.arange(-1000 if signed else 0, 1400 if signed else 2400, 100).reshape(4, 6)
    formula = linear_exact if function == "LINEAR" and width < 1 else FORMULAS[function]
    scale = (slope, intercept) if slope else (1, 0)
    shown = [formula(float(v) * scale[0] + scale[1], center, width) for v in values.ravel()]
    data = image(values, *window_tags(center, width, function, slope, intercept), signed=signed, inverted=inverted)
    assert_shows(data, [255 - y if inverted else y for y in shown])


@pytest.mark.parametrize("slope", [2, -2, 1e-20, 1e20])
def test_without_a_window_the_range_of_the_image_is_shown(slope):
    shown = [v / 2300 * 255 for v in range(0, 2400, 100)]
    tags = [("RescaleSlope", "DS", f"{slope}"), ("RescaleIntercept", "DS", "5e-21" if slope == 1e-20 else "5")]
    assert_shows(image(RAMP, *tags), [255 - y for y in shown] if slope < 0 else shown)


WINDOW = window_tags(1000, 400)
WINDOWED = [linear(v, 1000, 400) for v in range(0, 2400, 100)]


@pytest.mark.parametrize(
    "extra",
    [
        [("VOILUTSequence", "SQ", b"")],
        [("VOILUTSequence", "SQ", items(b""))],
        [("VOILUTSequence", "SQ", items(encode([("LUTExplanation", "LO", "empty")])))],
        [("VOILUTSequence", "SQ", lut(100, 0, 16, bytes(50)))],  # fewer entries than it says
        [("VOILUTFunction", "CS", "")],
        [("VOILUTFunction", "CS", " linear ")],
        [("VOILUTFunction", "CS", "LOGARITHM")],
        [("WindowWidth", "DS", "400\\")],
        [("WindowWidth", "DS", "\\400")],
        [("WindowWidth", "DS", "\\400"), ("WindowCenter", "DS", "\\1000")],
        [("WindowWidth", "DS", "0\\400\\5"), ("WindowCenter", "DS", "7\\1000\\8")],
        [("WindowWidth", "DS", "-5\\400"), ("WindowCenter", "DS", "7\\1000")],
        [("WindowWidth", "DS", "abc\\400"), ("WindowCenter", "DS", "7\\1000")],
        [("WindowWidth", "DS", "400,0"), ("WindowCenter", "DS", "1000,00 ")],
        [("WindowWidth", "DS", " 4E2"), ("WindowCenter", "DS", "+1.0e3")],
        [("WindowWidth", "UN", b"400 ")],
        [("WindowWidth", "US", 400), ("WindowCenter", "SS", 1000)],
        [("WindowWidth", "DS", "400\0")],
        [("RescaleSlope", "DS", ""), ("RescaleIntercept", "DS", "")],
        [("RescaleSlope", "DS", "1"), ("RescaleType", "LO", "US")],
        [("RescaleSlope", "DS", "1e300"), ("RescaleIntercept", "DS", "0")],
        [("RescaleSlope", "DS", "nan"), ("RescaleIntercept", "DS", "0")],
        [("VOILUTSequence", "UN", b"")],
        [
            ("VOILUTSequence", "SQ", b"\xfe\xff\x00\xe0\xff\xff\xff\xff\xfe\xff\x0d\xe0\0\0\0\0")
        ],  # an item without a length
        [("ModalityLUTSequence", "SQ", b"")],
        [("ModalityLUTSequence", "SQ", items(b""))],
        [("PhotometricInterpretation", "CS", "MONOCHROME2\0")],
        [("PhotometricInterpretation", "CS", "Monochrome2 ")],
        [("NumberOfFrames", "IS", "1 ")],
        [("NumberOfFrames", "IS", "")],
        [("SamplesPerPixel", "US", b"")],
        [("PixelPaddingValue", "US", b"")],
        [("PixelPaddingRangeLimit", "US", 5)],  # without a value it means nothing
        [("HighBit", "US", None)],
        [("HighBit", "US", 3)],  # impossible
        [("PixelRepresentation", "US", None)],
        [("PresentationLUTShape", "CS", "INVERSE")],  # repeats MONOCHROME1, and contradicts here
    ],
    ids=lambda extra: " ".join(f"{name}={value!r:.30}" for name, _, value in extra),
)
def test_odd_headers_beside_a_good_window(extra):
    names = {name for name, _, _ in extra}
    assert_shows(image(RAMP, *(tag for tag in WINDOW if tag[0] not in names), *extra), WINDOWED)


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("bits", [8, 9, 12, 15, 16])
@pytest.mark.parametrize("stage", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("inverted", [False, True], ids=["monochrome2", "monochrome1"])
def test_lookup_tables_of_8_to_16_bits(stage, bits, syntax, inverted):
    """Values 0 to 2300 by a table of 1000 entries from 500 on; below it the first entry, above it the last."""
    entries = [round((2**bits - 1) * (0.1 + 0.8 * (k / 999) ** 2)) for k in range(1000)]
    data = b"".join(struct.pack("<H", entry) for entry in entries)
    sequence = lut(1000, 500, bits, data)
    if syntax == BIG_ENDIAN:
        item = encode([("LUTDescriptor", "US", [1000, 500, bits]), ("LUTData", "US", entries)], BIG_ENDIAN)
        sequence = struct.pack(">HHI", 0xFFFE, 0xE000, len(item)) + item
    elif syntax == IMPLICIT:
        sequence = items(encode([("LUTDescriptor", "US", [1000, 500, bits]), ("LUTData", "OW", data)], IMPLICIT))
    seen = [entries[min(max(v - 500, 0), 999)] for v in range(0, 2400, 100)]
    if stage == "VOILUTSequence":
        shown = [entry / (2**bits - 1) * 255 for entry in seen]
    else:  # no window: the range of its output that is in the image
        shown = [(entry - min(seen)) / (max(seen) - min(seen)) * 255 for entry in seen]
    assert_shows(image(RAMP, (stage, "SQ", sequence), syntax=syntax, inverted=inverted),
                 [255 - y if inverted else y for y in shown])  # fmt: skip


@pytest.mark.parametrize(
    "count, bits, data",
    [
        (200, 8, bytes(range(50, 250))),  # one to a byte
        (199, 8, bytes(range(50, 249)) + b"\0"),  # padded to an even length
        (200, 8, b"".join(bytes([v, 0]) for v in range(50, 250))),  # one to a word
        (200, 16, bytes(range(50, 250))),  # the header says 16 bits, the length 8
    ],
    ids=["bytes", "odd", "words", "16 bits said"],
)
@pytest.mark.parametrize("vr", ["OW", "US", "OB"])
def test_lookup_tables_of_bytes(count, bits, data, vr):
    """Told apart by their length."""
    values = np.arange(0, 240, 10).reshape(4, 6)
    shown = [50 + min(v, count - 1) for v in range(0, 240, 10)]
    assert_shows(image(values, ("VOILUTSequence", "SQ", lut(count, 0, bits, data, vr)), bits=(8, 8, 7)), shown)


def test_lookup_tables_of_signed_values():
    """From -600 on, written as an unsigned number; a whole 65536 entries, which 16 bits cannot count."""
    values = np.arange(-1000, 1400, 100).reshape(4, 6)
    entries = b"".join(struct.pack("<H", 100 * k) for k in range(600))
    shown = [100 * min(max(v + 600, 0), 599) / 65535 * 255 for v in range(-1000, 1400, 100)]
    assert_shows(image(values, ("VOILUTSequence", "SQ", lut(600, -600, 16, entries)), signed=1), shown)
    rescaled = [("RescaleIntercept", "DS", "-1000"), ("RescaleSlope", "DS", "1")]
    assert_shows(image(values + 1000, ("VOILUTSequence", "SQ", lut(600, -600, 16, entries)), *rescaled), shown)
    whole = b"".join(struct.pack("<H", 65535 - k) for k in range(65536))
    shown = [(65535 - v) / 65535 * 255 for v in range(0, 2400, 100)]
    assert_shows(image(RAMP, ("VOILUTSequence", "SQ", lut(0, 0, 16, whole))), shown)


def test_the_order_of_the_stages():
    """A modality LUT goes before a window, a VOI LUT before a window, a good item before an empty one."""
    doubled = b"".join(struct.pack("<H", 2 * k) for k in range(2400))
    modality = ("ModalityLUTSequence", "SQ", lut(2400, 0, 16, doubled))
    assert_shows(image(RAMP, modality, *WINDOW), [linear(2 * v, 1000, 400) for v in range(0, 2400, 100)])
    scale = [("RescaleIntercept", "DS", "77"), ("RescaleSlope", "DS", "5")]  # not beside a LUT
    assert_shows(image(RAMP, modality, *WINDOW, *scale), [linear(2 * v, 1000, 400) for v in range(0, 2400, 100)])
    tables = b"".join(
        items(b"") if k == 1 else lut(2, 0, 8, bytes([level, level])) for k, level in enumerate((40, 0, 90))
    )
    for index, level in ((0, 40), (1, 40), (2, 90), (3, 40)):
        shown = np.full(24, level)
        assert_shows(image(RAMP, ("VOILUTSequence", "SQ", tables), *WINDOW), shown, window=index)
    windows = [("WindowWidth", "DS", "\\400\\700"), ("WindowCenter", "DS", "5\\1000\\900")]
    for index, (center, width) in enumerate([(1000, 400), (1000, 400), (900, 700), (1000, 400)]):
        shown = [linear(v, center, width) for v in range(0, 2400, 100)]
        take_warnings()
        assert_shows(image(RAMP, *windows), shown, window=index)
        said = [f"window {index} is missing or not valid: window 1 is used"] if index in (0, 3) else []
        assert [text for _, text, _ in take_warnings()] == said
    for index, said in ((0, []), (2, ["window 2 is missing, and so is any other: the image's own range is used"])):
        decode(image(RAMP), "a.dcm", window=index)
        assert [text for _, text, _ in take_warnings()] == said


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("signed", [0, 1], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [(16, 12, 15), (16, 10, 15), (16, 12, 13), (16, 12, 11), (8, 6, 7), (32, 12, 31)])
def test_the_value_lies_below_the_high_bit(bits, signed, syntax):
    """PS3.5 8.1.1; the other bits hold anything."""
    allocated, stored, high = bits
    values = np.arange(-12, 12) if signed else np.arange(24)
    rng = np.random.default_rng(0)
    junk = rng.integers(0, 1 << allocated, 24) & ~(((1 << stored) - 1) << (high + 1 - stored))
    words = ((values & ((1 << stored) - 1)) << (high + 1 - stored)) | junk
    if allocated == 8 and syntax == BIG_ENDIAN:  # bytes in words, whose halves are swapped
        words = words.reshape(-1, 2)[:, ::-1]
    shown = [(v - values[0]) / 23 * 255 for v in values]
    order = ">" if syntax == BIG_ENDIAN else "<"
    data = words.astype(f"{order}u{allocated // 8}").tobytes()
    assert_shows(image((data, 4, 6), bits=bits, signed=signed, syntax=syntax), shown)


@pytest.mark.parametrize(
    "signed, bits, padding, limit, pixel",
    [
        (1, (16, 16, 15), ("US", 32768), None, -32768),
        (1, (16, 12, 11), ("US", 2048), None, -2048),
        (1, (16, 12, 11), ("US", 63488), None, -2048),
        (1, (16, 16, 15), ("SS", -2000), None, -2000),
        (1, (16, 16, 15), ("US", 63536), ("US", 63546), -1995),
        (1, (16, 16, 15), ("SS", -1990), ("SS", -2000), -1995),
        (0, (16, 16, 15), ("SS", -32768), None, 32768),
        (0, (16, 16, 15), ("SS", -1), None, 65535),
        (0, (16, 16, 15), ("US", 0), None, 0),  # 0 is a value
        (0, (16, 16, 15), ("US", 0), ("US", 0), 0),
        (0, (8, 8, 7), ("US", 255), None, 255),
    ],
)
@pytest.mark.parametrize("inverted", [False, True], ids=["monochrome2", "monochrome1"])
def test_padding_in_either_signedness(signed, bits, padding, limit, pixel, inverted):
    """Padding is black, and the others have the whole range."""
    values = np.arange(1, 25).reshape(4, 6)
    values[1, 2] = values[3, 5] = pixel
    tags = [("PixelPaddingValue", *padding)] + ([("PixelPaddingRangeLimit", *limit)] if limit else [])
    shown = np.array([(v - 1) / 22 * 255 for v in values.ravel()]).reshape(4, 6)  # 1 to 23: 24 was replaced
    shown = 255 - shown if inverted else shown
    shown[1, 2] = shown[3, 5] = 0
    assert_shows(image(values, *tags, bits=bits, signed=signed, inverted=inverted), shown)


@pytest.mark.parametrize("signed", [0, 1], ids=["unsigned", "signed"])
def test_32_bits_of_any_range_take_little_memory(signed):
    """Worked out for each pixel where the values are many, and the same as where they are few."""
    values = np.arange(24).reshape(4, 6)
    low, step = (-(2**31), 186_737_708) if signed else (0, 186_737_708)
    shown = [v / 23 * 255 for v in range(24)]
    tracemalloc.start()
    for start, by in ((low, step), (low, 1), (low + 2**31, 40_000)):
        data = image(values * by + start, bits=(32, 32, 31), signed=signed)
        assert_shows(data, shown)
        wide = window_tags(start + 11.5 * by + 0.5, 23 * by + 1)
        assert_shows(image(values * by + start, *wide, bits=(32, 32, 31), signed=signed), shown)
        assert_shows(data, shown, recipe="mimic_jpg")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_deflated_file_is_refused_before_it_is_inflated(monkeypatch):
    ds = pydicom.dcmread(io.BytesIO(dicom(np.zeros((500, 500), np.uint16))))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data = io.BytesIO()
    pydicom.dcmwrite(data, ds, enforce_file_format=True)
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("it was inflated"))
    with pytest.raises(ImageError, match="Deflated Explicit VR Little Endian is not supported"):
        decode(data.getvalue(), "a.dcm")


def test_pictures_of_other_depths():
    data = io.BytesIO()
    Image.fromarray(RAMP).save(data, "PNG")  # 16 bits; so few pixels that the percentiles are the ends
    np.testing.assert_array_equal(decode(data.getvalue(), "a.png"), np.round(RAMP / RAMP.max() * 255))
    color = np.zeros((5, 4, 3), np.uint8)
    color[..., 1] = 200
    assert decode(jpg(color), "a.jpg").shape == (5, 4)


HUGE = jpg(np.zeros((8, 8), np.uint8)).replace(b"\x00\x08\x00\x08", b"\xff\xfe\xff\xfe", 1)


@pytest.mark.parametrize(
    "data, name, message",
    [
        (b"", "x.jpg", "the file is empty"),
        (b"not an image", "x.jpg", "cannot identify image"),
        (jpg(np.arange(4096, dtype=np.uint8).reshape(64, 64))[:900], "x.jpg", "truncated"),
        (HUGE, "x.jpg", f"at most {MAX_PIXELS:,} are read"),
        (dicom(RAMP)[:-20], "x.dcm", "cannot be read as an image"),
        (dicom(RAMP, PixelData=None), "x.dcm", "the DICOM has no PixelData"),
        (dicom(RAMP, Rows=None), "x.dcm", "the DICOM has no Rows"),
        (dicom(RAMP, Rows=60000, Columns=60000), "x.dcm", f"at most {MAX_PIXELS:,} are read"),
        (dicom(RAMP, NumberOfFrames=3), "x.dcm", "not a single grayscale image"),
        (dicom(RAMP, PhotometricInterpretation="PALETTE COLOR"), "x.dcm", "'PALETTE COLOR'; expected MONOCHROME1"),
        (dicom(RAMP).replace(b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.2.1.99"[:20]), "x.dcm", "not supported"),
    ],
    ids=["empty", "text", "truncated", "huge jpg", "short pixels", "no pixels", "no rows", "huge dicom",
         "frames", "palette", "syntax"],
)  # fmt: skip
def test_broken_images_name_the_file(data, name, message):
    with pytest.raises(ImageError, match=f"^/a/{name}: .*{message}"):
        decode(data, f"/a/{name}")


def compressed(pixels, syntax):
    """Bytes of a DICOM with the image compressed by an encoder that is here."""
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"
    ds.PhotometricInterpretation, ds.SamplesPerPixel = "MONOCHROME2", 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = pixels.tobytes()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if syntax == JPEGBaseline8Bit:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=95)
        ds.PixelData = pydicom.encaps.encapsulate([out.getvalue()])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = syntax
    elif syntax != ExplicitVRLittleEndian:
        ds.compress(syntax)
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


SYNTAXES = (ExplicitVRLittleEndian, RLELossless, JPEGBaseline8Bit, JPEG2000Lossless)


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEG2000Lossless])
def test_a_compressed_frame_larger_than_the_header_is_refused_before_it_is_decoded(syntax):
    pixels = np.arange(64 * 48, dtype=np.uint8).reshape(64, 48)
    data = compressed(pixels, syntax)
    assert decode(data, "a.dcm").shape == (64, 48)
    numbers = ">HH" if syntax == JPEGBaseline8Bit else ">II"
    sizes = (64, 48) if syntax == JPEGBaseline8Bit else (48, 64)
    before = struct.pack(numbers, *sizes)
    assert data.count(before) >= 1
    with pytest.raises(ImageError, match=r"the pixels are \(60000, 60000\), the header has \(64, 48\)"):
        decode(data.replace(before, struct.pack(numbers, 60000, 60000), 1), "a.dcm")


# -------------------------------------------------------------------------------------------- cut short
def with_frame(ds, value):
    """The file with another value of PixelData."""
    ds["PixelData"].value = value
    ds["PixelData"].is_undefined_length = True
    data = io.BytesIO()
    pydicom.dcmwrite(data, ds)
    return data.getvalue()


COMPRESSED = {
    "baseline": None,  # made here
    "extended": "JPGExtended.dcm",
    "lossless": SHARED / "cxr_dicom/other/JPGLosslessP14SV1_1s_1f_8b.dcm",
    "jpeg-ls": "MR_small_jpeg_ls_lossless.dcm",
    "jpeg-ls near": "JPEGLSNearLossless_16.dcm",
    "jpeg 2000": "JPEG2000.dcm",
    "jpeg 2000 lossless": "MR_small_jp2klossless.dcm",
    "jpeg 2000 padded": "693_J2KI.dcm",
    "rle": "MR_small_RLE.dcm",
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_frame_cut_short_is_refused_and_a_whole_one_is_read(kind):
    """In one fragment or several, with padding, with what is not of the image after its end."""
    if kind == "baseline":
        pixels = np.arange(64 * 48, dtype=np.uint8).reshape(64, 48)
        ds = pydicom.dcmread(io.BytesIO(compressed(pixels, JPEGBaseline8Bit)))
    elif kind == "lossless":
        if not COMPRESSED[kind].is_file():
            pytest.skip("no JPEG Lossless file without ../shared")
        ds = pydicom.dcmread(COMPRESSED[kind])
    else:  # it comes with pydicom
        ds = pydicom.dcmread(pydicom.data.get_testdata_file(COMPRESSED[kind], download=False))
    frame = b"".join(list(pydicom.encaps.generate_fragments(ds.PixelData))[1:])
    expected = decode(with_frame(ds, encapsulated(frame)), "a")
    assert expected.std() > 1
    third = len(frame) // 6 * 2
    several = [frame[:third], frame[third : 2 * third], frame[2 * third :]]
    table = struct.pack("<2sHII", b"\xfe\xff", 0xE000, 4, 0)  # of offsets: one frame, at the start
    wrong = struct.pack("<2sHIII", b"\xfe\xff", 0xE000, 8, 0, third + 8)  # an offset for each of two fragments
    wholes = {
        "fragments": encapsulated(*several),
        "padding": encapsulated(frame + bytes(10)),
        "table": table + encapsulated(*several)[8:],
        "table of fragments": wrong + encapsulated(*several)[8:],
    }
    if kind != "rle":  # its padding ends the last segment
        wholes |= {"odd bytes": encapsulated(frame + b"\xff\xff"), "junk": encapsulated(frame + b"made by nobody")}
    for what, value in wholes.items():
        np.testing.assert_array_equal(decode(with_frame(ds, value), "a"), expected, what)
    body = frame.rstrip(b"\0")
    # Zeros are as good as any in RLE, and no mark says where it ends.
    rle = kind == "rle"
    for length in (int(0.9 * len(body)), len(body) // 2, 40, len(body) - (60 if rle else 3), 0):
        for tail in (b"",) if rle else (b"", bytes(100)):
            with pytest.raises(
                ImageError, match=r"^a: cannot be read as an image \(.*cut short.*\); replace the file$"
            ):
                decode(with_frame(ds, encapsulated(frame[:length] + tail)), "a")
    data = with_frame(ds, encapsulated(frame))
    for length in (len(data) - len(frame) // 2, 400, 200):
        with pytest.raises(ImageError, match="cut short"):
            decode(data[:length], "a")


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
def test_an_uncompressed_file_cut_short_is_called_so(syntax):
    """Wherever it is cut: never that the Rows are missing."""
    data = image(RAMP, *WINDOW, ("VOILUTSequence", "SQ", b""), ("InstitutionName", "LO", "x" * 60), syntax=syntax)
    start = data.index(b"1.2.840.10008.5.1.4.1.1.1.1") + 20
    for length in range(start, len(data)):
        with pytest.raises(ImageError, match="cut short"):
            decode(data[:length], "a")
    with pytest.raises(ImageError, match=r"the header is wrong: 48 of 4,800 bytes of pixels exist\)$"):
        decode(image(RAMP, ("Rows", "US", 400)), "a")


def picture(kind, **save):
    """Bytes of a picture of noise on a ramp."""
    noise = np.random.default_rng(0).integers(0, 20, (40, 56))
    data = io.BytesIO()
    Image.fromarray((np.arange(40 * 56).reshape(40, 56) // 10 + noise).astype(np.uint8)).save(data, kind, **save)
    return data.getvalue()


@pytest.mark.parametrize(
    "kind, save",
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"restart_marker_blocks": 1}), ("PNG", {}),
     ("PNG", {"compress_level": 0})],
)  # fmt: skip
def test_a_picture_cut_short_is_refused_wherever_it_is_cut(kind, save):
    """Also where the rest of the file is there, but zeros, as after a download that was not finished."""
    data = picture(kind, **save)
    expected = decode(data, "a")
    np.testing.assert_array_equal(decode(data + b"junk of a telephone", "a"), expected)
    for length in {*range(12, len(data), 37), *range(len(data) - 24, len(data) - 1)} - {
        len(data) - k for k in range(6)
    }:
        for tail in (b"", bytes(len(data) - length)):
            with pytest.raises(ImageError, match="cut short|checksum"):
                decode(data[:length] + tail, "a")
    if kind == "PNG":
        middle = len(data) // 2
        with pytest.raises(ImageError, match="checksum"):
            decode(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "a")


def test_a_thumbnail_does_not_end_a_picture():
    exif = Image.Exif()
    exif[0x010E] = "text"
    data = picture("JPEG", exif=exif.tobytes() + b"\xff\xd8 a thumbnail \xff\xd9")
    assert decode(data, "a").shape == (40, 56)
    with pytest.raises(ImageError, match="cut short"):
        decode(data[: len(data) * 3 // 4], "a")


# ------------------------------------------------------------------------------------------- odd pictures
# Where pixel (row, column) of the stored picture of H x W is seen; from the table of the EXIF standard (0th row, 0th
# column: 2 top right, 3 bottom right, 4 bottom left, 5 left top, 6 right top, 7 right bottom, 8 left bottom).
SEEN = {
    1: lambda i, j, h, w: (i, j),
    2: lambda i, j, h, w: (i, w - 1 - j),
    3: lambda i, j, h, w: (h - 1 - i, w - 1 - j),
    4: lambda i, j, h, w: (h - 1 - i, j),
    5: lambda i, j, h, w: (j, i),
    6: lambda i, j, h, w: (j, h - 1 - i),
    7: lambda i, j, h, w: (w - 1 - j, h - 1 - i),
    8: lambda i, j, h, w: (w - 1 - j, i),
    9: lambda i, j, h, w: (i, j),  # no orientation
}


@pytest.mark.parametrize("shrink_to", [0, 12])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("value", SEEN)
def test_pictures_are_turned_upright(value, kind, shrink_to):
    blocks = np.array([[10, 60, 110, 160], [200, 250, 30, 80]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = value
    data = io.BytesIO()
    Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(data, kind, exif=exif, quality=100)
    grey = decode(data.getvalue(), "a", shrink_to=shrink_to)
    side = min(grey.shape) // 2
    for i in range(2):
        for j in range(4):
            row, column = SEEN[value](i, j, 2, 4)
            assert abs(int(grey[row * side + side // 2, column * side + side // 2]) - blocks[i, j]) < 4, (i, j)


def test_a_damaged_exif_block_does_not_matter():
    whole = decode(picture("JPEG"), "a")
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff nonsense", b"Exif\0\0nonsense"):
        np.testing.assert_array_equal(decode(picture("JPEG", exif=exif), "a"), whole)


def test_pictures_of_other_modes():
    """1 bit, palette, alpha (whatever it is, the picture below it counts), CMYK: the grey of the colours."""
    grey = (np.arange(24).reshape(4, 6) * 11).astype(np.uint8)
    plain = Image.fromarray(grey)
    alpha = Image.fromarray(grey[::-1].copy())
    pictures = {
        "1": (plain.convert("1", dither=Image.Dither.NONE), np.where(grey > 127, 255, 0)),
        "LA": (Image.merge("LA", (plain, alpha)), grey),
        "RGBA": (Image.merge("RGBA", (plain, plain, plain, alpha)), grey),
        "P": (plain.convert("P"), grey),
        "RGB": (plain.convert("RGB"), grey),
    }
    for mode, (shown, expected) in pictures.items():
        data = io.BytesIO()
        shown.save(data, "PNG")
        assert Image.open(data).mode == mode
        np.testing.assert_array_equal(decode(data.getvalue(), "a"), expected, mode)
    data = io.BytesIO()
    Image.fromarray(grey.repeat(8, 0).repeat(8, 1)).convert("CMYK").save(data, "JPEG", quality=100)
    assert np.abs(decode(data.getvalue(), "a")[4::8, 4::8].astype(int) - grey).max() < 4


# ------------------------------------------------------------------------------------------ what a file is
@pytest.mark.parametrize("name", ["a.dcm", "a.DCM", "a.dicom", "a.jpg", "a.jpeg", "a.png", "a", "a.b.c"])
def test_the_content_decides_the_format_not_the_name(name):
    for data, kind in ((picture("JPEG"), "jpg"), (picture("PNG"), "png"), (image(RAMP, *WINDOW), "dcm")):
        assert sniff(data) == kind
        np.testing.assert_array_equal(decode(data, name), decode(data, "other"))
    assert sniff(b"") == sniff(b"BM some other picture") == ""


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_a_data_set_without_preamble_and_mark(syntax):
    data = image(RAMP, *WINDOW, syntax=syntax, bare=True)
    assert sniff(data) == "dcm"
    assert_shows(data, WINDOWED)
    study = items(encode([("ReferencedSOPClassUID", "UI", "1.2")], syntax))
    assert_shows(image(RAMP, *WINDOW, ("ReferencedStudySequence", "SQ", study), syntax=syntax, bare=True), WINDOWED)
    for length in range(100, len(data), 7):
        with pytest.raises(ImageError, match="cut short"):
            decode(data[:length], "a")
    whole = image(RAMP, *WINDOW, syntax=syntax)
    assert_shows(whole[132:], WINDOWED)  # from the meta group on
    meta = encode([("ImplementationVersionName", "SH", "NONE")])  # "DICM", but no transfer syntax
    assert_shows(bytes(128) + b"DICM" + meta + data, WINDOWED)


def test_garbage_is_no_data_set():
    rng = np.random.default_rng(0)
    for k in range(300):
        start = [b"\x08\0", b"\x08\0\x05\0CS", b"\x02\0\0\0UL\x04\0", b""][k % 4]
        with pytest.raises(ImageError) as error:
            decode(start + rng.bytes(int(rng.integers(0, 400))), "a")
        assert "force" not in str(error.value) and " at 0x" not in str(error.value)


@pytest.mark.parametrize(
    "data, message, replace",
    [
        (b"", "the file is empty", True),
        (b"<!DOCTYPE html><html>", "neither JPG, PNG nor DICOM, but a web page", True),
        (b"\n  <html>", "a web page", True),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a pointer of Git LFS, .*git lfs pull", True),
        (b"\x1f\x8b\x08", "compressed by gzip", True),
        (bytes(5000), "zeros, as of a download that was not finished", True),
        (b"\xff\xd8\xff\xe0", "cut short", True),
        (
            image(RAMP, ("SamplesPerPixel", "US", 3)),
            r"not a single grayscale image: 1 frame\(s\), 3 sample\(s\)",
            False,
        ),
        (image(RAMP, ("BitsAllocated", "US", 12)), "16 of 12 bits a pixel; all of 1, 8, 16 or 32 are read", False),
        (image(RAMP, ("BitsStored", "US", 0)), "0 of 16 bits a pixel", False),
        (image(RAMP, ("BitsStored", "US", None)), "the DICOM has no BitsStored", False),
        (image(RAMP, ("Columns", "US", b"")), "the DICOM has no Columns", False),
        (image(RAMP, ("PixelData", "OW", None)), "the DICOM has no PixelData", False),
        (image(RAMP, ("PixelData", "OW", b"")), "the header is wrong: 0 of 48 bytes", False),
        (image(RAMP, ("PhotometricInterpretation", "CS", "")), "PhotometricInterpretation is ''; expected", False),
        (image(RAMP * 0, ("PixelPaddingValue", "US", 0)), "all pixels are padding", False),
        (image(RAMP, syntax="1.2.840.10008.1.2.4.103"), "transfer syntax MPEG-4 AVC/H.264 .* is not supported", False),
        (image((encapsulated(b"abc"), 4, 6)), "the pixels are compressed, the transfer syntax is Explicit VR", False),
        (
            image(RAMP, syntax="1.2.840.10008.1.2.5"),
            "the pixels are not compressed, the transfer syntax is RLE",
            False,
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_refusals_name_the_cause_and_the_remedy_where_it_is_one(data, message, replace):
    with pytest.raises(ImageError, match=f"^a: cannot be read as an image \\(.*({message})") as error:
        decode(data, "a")
    assert str(error.value).endswith("; replace the file") == replace
    assert " at 0x" not in str(error.value) and "force" not in str(error.value)


def test_warnings_are_counted_by_kind_and_not_printed(recwarn, capfd):
    take_warnings()
    for k in range(5):
        decode(image(RAMP, *WINDOW, ("VOILUTFunction", "CS", f"F{k}")), f"{k}.dcm")
        decode(image(RAMP, ("PixelPaddingValue", "US", 300 + k), bits=(16, 8, 7)), f"{k}.dcm")
        decode(image(RAMP, *WINDOW), "good.dcm")
    data = image(RAMP, *WINDOW).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0")  # implicit, it says
    assert_shows(data, WINDOWED)
    assert sorted(take_warnings()) == [
        (1, "Expected implicit VR, but found explicit VR - using explicit VR for reading", "a"),
        (5, "PixelPaddingValue 300 is no value that a pixel can have", "0.dcm"),
        (5, "VOILUTFunction 'F0' is unknown: taken for LINEAR", "0.dcm"),
    ]
    assert take_warnings() == []
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_the_audit_names_what_is_odd_once_a_kind(own_tree, tmp_path, capfd):
    """Every file is read, whatever its name; the summary has a line for each kind of oddity, the table each file."""
    import prepare_mimic

    paths = sorted(own_tree.rglob("*.jpg"))
    noise = np.random.default_rng(0).integers(0, 4000, (len(paths), 64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    for k, path in enumerate(paths[:12]):
        path.unlink()
        if k < 3:
            Image.fromarray(noise[k].astype(np.uint8)).save(path.with_suffix(".jpeg"), exif=exif)
        elif k < 8:  # two kinds
            odd = ("VOILUTFunction", "CS", f"F{k}") if k < 6 else ("PixelPaddingValue", "SS", -5000 - k)
            name = path.with_suffix((".dicom", ".DCM", "")[k % 3])
            name.write_bytes(image(noise[k], *window_tags(2000, 4000), odd, bits=(16, 12, 11)))
        else:
            path.write_bytes(image(noise[k], *WINDOW))
    assert prepare_mimic.main(["audit", "--data-path", str(own_tree), "--output", str(tmp_path / "audit")]) in (0, 1)
    lines = (tmp_path / "audit" / "audit.txt").read_text().splitlines()
    counts = {" ".join(line.split()[1:3]): line for line in lines}
    assert "turned: pictures" in counts and counts["turned: pictures"].split()[0] == "3"
    assert "EXIF orientation 6" in counts["turned: pictures"]
    odd = [line for line in lines if "odd header: " in line]
    assert sorted(line.split()[0] for line in odd) == ["2", "3"]
    assert any("VOILUTFunction 'F" in line for line in odd) and any("PixelPaddingValue -50" in line for line in odd)
    wrong = [line for line in lines if "wrong suffix: " in line]
    assert len(wrong) == 1 and wrong[0].split()[0] == "4" and wrong[0].endswith("the content is .dcm")
    assert not [line for line in lines if "missing: " in line or "unreadable: " in line]
    assert "Warning" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_says_what_is_odd_once_a_kind(workers, capfd):
    import logging

    import torch

    from dataset.build import EvalSampler, Loader

    class Images(torch.utils.data.Dataset):
        task = "multilabel"

        def __len__(self):
            return 16

        def __getitem__(self, index):
            grey = decode(image(RAMP, *WINDOW, ("VOILUTFunction", "CS", f"F{index}")), f"{index}.dcm")
            return torch.from_numpy(grey)[None], torch.zeros(1)

    take_warnings()
    said = []
    log = logging.Logger("said")
    log.addHandler(type("Said", (logging.Handler,), {"emit": lambda self, record: said.append(record.getMessage())})())
    data = Node(NUM_WORKERS=workers, PIN_MEMORY=False, ON_BAD_IMAGE="error", IMG_SIZE=8)
    config = Node(DATA=data, AUG=Node(MEAN=[0.5] * 3, STD=[0.5] * 3), SEED=0)
    sampler = EvalSampler(16, batch_size=2, rank=0, world_size=1)
    loader = Loader(config, Images(), sampler, torch.device("cpu"), log)
    for _ in range(2):
        assert len(list(loader)) == 8
    text = "VOILUTFunction 'F0' is unknown: taken for LINEAR; logged once, `prepare_mimic.py audit` counts such images"
    assert said == [f"0.dcm: {text}"]
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------- the domain
def test_the_domain_of_images_is_told_by_their_content(tmp_path):
    """Not by their names; a copy has that of what it was made of."""
    from dataset.labels import LABELS
    from dataset.tools.cache import make_copy

    for kind, data in (("pictures", picture("JPEG")), ("dicom", image(RAMP.repeat(9, 0).repeat(9, 1), *WINDOW))):
        root = tmp_path / kind
        root.mkdir()
        names = [f"{k}.jpg" for k in range(20)]
        for name in names:
            (root / name).write_bytes(data)
        rows = "".join(f"{name},test{',0' * len(LABELS)}\n" for name in names)
        (root / "own.csv").write_text(f"path,split,{','.join(LABELS)}\n{rows}")
        for recipe in ("window", "mimic_jpg"):
            expected = "pictures" if kind == "pictures" else f"dicom {recipe}"
            assert image_domain(FileStore(root), names, recipe) == expected
            out = tmp_path / f"{kind} {recipe}"
            make_copy(root, out, size=16, dicom_recipe=recipe, workers=1, log=lambda _: None)
            assert image_domain(FileStore(out), np.array([b"3.jpg"]), "window") == expected
    (root / "0.jpg").write_bytes(picture("PNG"))
    assert image_domain(FileStore(root), names, "window") == "dicom window and pictures"
    assert image_domain(FileStore(root), ["not there.jpg"], "window") == ""


def test_another_domain_is_one_line_that_names_the_remedy():
    same = ["pictures", "dicom mimic_jpg"]
    for one in same:
        assert [domain_warning(one, other) for other in same] == ["", ""]
        assert domain_warning(one, "dicom window").endswith("use DATA.DICOM_RECIPE mimic_jpg")
    assert domain_warning("dicom window", "dicom window") == domain_warning("", "pictures") == ""
    assert domain_warning("dicom window", "dicom mimic_jpg").endswith("use DATA.DICOM_RECIPE window")
    for trained, here in (("dicom window", "pictures"), ("pictures", "dicom window and pictures")):
        said = domain_warning(trained, here)
        assert trained in said and here in said and "DATA.DICOM_RECIPE" in said and "\n" not in said


def mutated(data, rng):
    """Some bytes changed, cut out, repeated or cut off; often near the start, where the headers lie."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(0, min(len(data), 1200) if rng.random() < 0.7 else len(data)))
        kind, length = rng.integers(0, 5), int(rng.integers(1, 40))
        if kind == 0:
            data[place] = rng.integers(0, 256)
        elif kind == 1:
            data[place : place + length] = rng.bytes(length)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length] * 3
        else:
            data[place : place + 2] = b"\xff\xff"
        if len(data) < 2:
            break
    return bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.15 else data)


FUZZ_MB = 1000


def test_mutated_files_are_read_or_refused(tree):
    """Thousands of damaged files: an image or our error, within 20 s and 1 GB each; in a process of its own."""
    pixels = np.asarray(Image.open(sorted(tree.rglob("*.jpg"))[0]).convert("L"))
    seeds = [(sorted(tree.rglob("*.jpg"))[0].read_bytes(), "a.jpg")]
    seeds += [(compressed(pixels, s), "a.dcm") for s in SYNTAXES]
    for name in COMPRESSED.values():  # the syntaxes that nothing here can encode
        path = pydicom.data.get_testdata_file(name, download=False) if isinstance(name, str) else name
        seeds += [(Path(path).read_bytes(), "a.dcm")] if path and Path(path).is_file() else []
    tables = [(f"{k}LUTSequence", "SQ", lut(1000, -500, 12, bytes(2000))) for k in ("Modality", "VOI")]
    seeds += [
        (image(pixels, *WINDOW, bits=(16, 12, 13), signed=1, bare=True), "a.dcm"),
        (image(pixels, *WINDOW, *tables, syntax=IMPLICIT), "a.dcm"),
        (image(pixels.astype(np.int64) << 24, ("PixelPaddingValue", "US", 0), bits=(32, 32, 31)), "a.dcm"),
        (image(pixels, *WINDOW, syntax=BIG_ENDIAN), "a.dcm"),
        (picture("PNG"), "a.png"),
    ]
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    at = mmap.mmap(-1, 16)  # which one: it outlives a crash
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders complain
            warnings.simplefilter("ignore")
            read = 0
            for k in range(4000):
                at[:16] = struct.pack("qq", k, read)
                data, name = seeds[k % len(seeds)]
                signal.alarm(20)
                try:
                    recipe = ("window", "mimic_jpg")[k // len(seeds) % 2]
                    grey = decode(mutated(data, np.random.default_rng(k)), name, recipe=recipe)
                    assert grey.dtype == np.uint8 and grey.ndim == 2 and grey.size
                    read += 1
                except ImageError:
                    pass
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 - begun
            os._exit(0 if grown < FUZZ_MB else 2)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    number, read = struct.unpack("qq", at[:16])
    assert status == 0, f"mutation {number} of {seeds[number % len(seeds)][1]} ended with {status}"
    assert 400 < read < 3600  # some harmless, some not


# ------------------------------------------------------------------------------------ real X-rays
shared = pytest.mark.skipif(not (SHARED / "cxr_dicom").is_dir(), reason="the real X-rays of ../shared are not here")


@shared
def test_real_dicoms_show_the_pictures_of_the_sample():
    """Ten real X-rays as DICOM of every kind: the same picture as the (equalised) JPG.

    Up to contrast when windowed; under mimic_jpg up to JPEG's losses and the resizing.
    """
    paths = sorted((SHARED / "cxr_dicom" / "files").rglob("*.dcm"))
    assert len(paths) == 10
    for path in paths:
        grey = decode(path.read_bytes(), str(path))
        twin = SHARED / "cxr_sample" / path.relative_to(SHARED / "cxr_dicom").with_suffix(".jpg")
        small = np.asarray(Image.open(twin).convert("L"), float)
        large = np.asarray(Image.fromarray(grey).resize(small.shape[::-1], Image.Resampling.BILINEAR), float)
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.8, path.name
        grey = decode(path.read_bytes(), str(path), recipe="mimic_jpg")
        same = np.asarray(Image.fromarray(grey).resize(small.shape[::-1], Image.Resampling.BOX), float)
        assert np.corrcoef(small.ravel(), same.ravel())[0, 1] > 0.999, path.name
        assert np.abs(small - same).mean() < 5, path.name


@shared
def test_public_dicom_files_are_read():
    paths = list((SHARED / "cxr_dicom" / "other").glob("*.dcm"))
    assert len(paths) == 4
    for path in paths:
        assert decode(path.read_bytes(), str(path)).std() > 5, path.name


# ------------------------------------------------------------------- headers of a wrong length or kind, other depths
ODD_ELEMENTS = [
    ("StudyID", "FL", b"123456"),  # no whole number of floats
    ("StudyID", "DS", "no number"),
    ("PatientID", "US", b"abc "),
    ("ViewCodeSequence", "LO", "frontal"),
    ("ViewCodeSequence", "SQ", b""),
    ("ViewPosition", "SQ", items(b"")),
    ("PerformedProcedureStepDescription", "ZZ", "chest"),
    ("SpecificCharacterSet", "CS", b"ISO\0IR 100 "),
    ("SpecificCharacterSet", "CS", "no such set"),
    ("SpecificCharacterSet", "US", b"\0\xff"),
    ("StudyDate", "ZZ", "x"),
]


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
@pytest.mark.parametrize("element", ODD_ELEMENTS, ids=lambda element: f"{element[0]} {element[1]}")
def test_elements_that_do_not_concern_the_pixels_do_not_stop_them(element, syntax, tmp_path):
    from dataset.tools.listing import IDS, Listed, identify

    name, vr, value = element
    texts = [("StudyDescription", "LO", "one"), ("PatientID", "LO", "p1"), ("ViewPosition", "CS", "AP")]
    data = image(RAMP, *(text for text in texts if text[0] != name), (name, vr, value), syntax=syntax)
    np.testing.assert_array_equal(decode(data, "a.dcm"), decode(image(RAMP, syntax=syntax), "b.dcm"))
    found = identify(Listed("a.dcm", tmp_path / "a.dcm"), data)
    assert found.keys() == set(IDS) and all(isinstance(text, str) for text in found.values())
    if name not in ("PatientID", "SpecificCharacterSet") and vr != "ZZ":  # of an unknown kind the end is not known
        assert found["patient_id" if "patient_id" in found else "subject_id"] == "p1"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("hot", [65535, 0])
def test_a_hot_pixel_does_not_change_the_others(kind, hot):
    """Of 12 bits in 16; the percentiles are those of NumPy's sorted values."""
    pixels = np.random.default_rng(8).integers(800, 3200, (64, 64)).astype(np.uint16)
    damaged = pixels.copy()
    damaged[5, 7] = hot
    grey = []
    for values in (pixels, damaged):
        data = io.BytesIO()
        Image.fromarray(values).save(data, kind)
        grey.append(decode(data.getvalue(), "a").astype(int))
    low, high = np.sort(pixels.ravel())[[round(0.001 * 4095), round(0.999 * 4095)]].astype(float)
    expected = ((pixels - low) / (high - low) * 255).clip(0, 255)
    assert np.abs(grey[0] - expected).max() <= 0.51
    other = np.ones_like(pixels, bool)
    other[5, 7] = False
    assert np.abs(grey[0] - grey[1])[other].max() <= 1 and grey[1][5, 7] == (255 if hot else 0)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_tiff_whose_white_is_zero_is_inverted(photometric, depth):
    pixels = np.arange(64 * 64).reshape(64, 64) * (3 if depth == 16 else 1) % (1 << depth)
    strip = pixels.astype(f"<u{depth // 8}").tobytes()
    tags = [(256, 64), (257, 64), (258, depth), (259, 1), (262, photometric), (273, 8 + 2 + 9 * 12 + 4), (277, 1),
            (278, 64), (279, len(strip))]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
    grey = decode(head + b"\0\0\0\0" + strip, "a.tif").astype(int)
    rising = np.diff(grey.ravel()[:200])
    assert (rising >= 0).all() if photometric else (rising <= 0).all()
    assert sniff(head) == "tif"
