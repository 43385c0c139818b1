"""Images: the display pipeline of DICOM against the formulas of the standard, and every damage and oddity of a file."""

import io
import mmap
import os
import resource
import signal
import struct
import warnings
import zlib

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
from dataset.dicom import MAX_PIXELS
from dataset.images import ImageError, decode


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
    Image.fromarray(RAMP).save(data, "PNG")  # 16 bits
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
        (dicom(RAMP, NumberOfFrames=3), "x.dcm", "not a single grey image"),
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
    with pytest.raises(ImageError, match=r"the pixels are \(60000, 60000\), the header says \(64, 48\)"):
        decode(data.replace(before, struct.pack(numbers, 60000, 60000), 1), "a.dcm")


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
    if (SHARED / "cxr_dicom").is_dir():  # the syntaxes that nothing here can encode
        seeds += [
            (p.read_bytes(), "a.dcm") for p in (SHARED / "cxr_dicom").rglob("*.dcm") if p.stat().st_size < 300_000
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
                    image = decode(mutated(data, np.random.default_rng(k)), name, recipe=recipe)
                    assert image.dtype == np.uint8 and image.ndim == 2 and image.size
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
