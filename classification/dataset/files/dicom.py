"""DICOM file -> stored values -> grayscale uint8 [H, W], by one of two recipes (`dataset.files.display`). No torch.

pydicom parses the header and decodes frames; what it or its decoders would take on trust is looked at before.
A fault of the file can be any exception; it is `codestreams.Unusable` if another copy would not mend it.
"""

import io
import logging
import struct
import warnings

import numpy as np
from PIL import Image
from pydicom import filereader
from pydicom.charset import default_encoding
from pydicom.encaps import encapsulate, generate_fragments
from pydicom.pixels import get_decoder
from pydicom.tag import Tag
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)  # fmt: skip

from dataset.files.codestreams import MAX_PIXELS, Unusable, check_size, read_jpeg, read_jpeg2000  # noqa: F401
from dataset.files.display import RECIPES, photometric

# It repeats its warnings there, and a decoder's failure with a traceback.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

_convert_encodings = filereader.convert_encodings


def _convert_any_encodings(names):
    """pydicom's function; a NUL or numbers in SpecificCharacterSet, errors there, concern texts alone."""
    try:
        return _convert_encodings(names)
    except Exception:  # ValueError, TypeError, ...: as the header has it
        return [default_encoding]


filereader.convert_encodings = _convert_any_encodings

UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
# Deflated files are refused: 261 kB of them can inflate to 268 MB.
READ = (*UNCOMPRESSED, *JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, JPEG2000Lossless, JPEG2000, RLELossless)

PIXEL_DATA = 0x7FE00010
# The elements that are read; the others are skipped.
NAMES = """
SamplesPerPixel PlanarConfiguration PhotometricInterpretation NumberOfFrames Rows Columns BitsAllocated BitsStored
HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit ModalityLUTSequence RescaleIntercept RescaleSlope
VOILUTSequence WindowCenter WindowWidth VOILUTFunction
"""
HEADER = [Tag(name) for name in NAMES.split()]
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # PS3.3 C.7.6.3.1.2
NEEDED = ("Rows", "Columns", "BitsAllocated", "BitsStored")


def decode_dicom(data, recipe, window):
    """Bytes of a DICOM file -> uint8 [H, W]; see :func:`dataset.files.images.decode` for the arguments."""
    dataset, syntax, pixels = _read(data)
    _check_kind(dataset)
    return RECIPES[recipe](_stored_values(dataset, syntax, pixels), dataset, window)


# ----------------------------------------------------------------------------------------------- the header
class _File(io.BytesIO):
    """Notes whether more was asked of it than it holds: a file that is cut short within its header."""

    def __init__(self, data):
        super().__init__(data)
        self.size, self.cut = len(data), False

    def read(self, size=-1):
        data = super().read(size)
        # Eight bytes are asked for after the last element, too, where none are.
        self.cut |= len(data) < size and (size != 8 or data != b"" or self.tell() > self.size)
        return data


def begins_as_dicom(data):
    """Whether a file is a DICOM: by its preamble, or as a data set without one whose first elements make sense."""
    if data[128:132] == b"DICM":
        return True
    position, last = 0, 0
    for _ in range(3):
        if len(data) < position + 12:
            return False
        group, element, vr, length = struct.unpack_from("<HH2sH", data, position)
        start = position + 8
        if not _is_vr(vr):
            length = struct.unpack_from("<I", data, position + 4)[0]
        elif vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
            start, length = position + 12, struct.unpack_from("<I", data, position + 8)[0]
        tag = group << 16 | element
        if tag <= last or not (last or group in (0x02, 0x08, 0x10, 0x18, 0x20, 0x28)):
            return False
        if length == 0xFFFFFFFF and last:  # a sequence
            return True
        if length % 2 or start + length > len(data):
            return False
        position, last = start + length, tag
    return True


def _is_vr(letters):
    return letters.isalpha() and letters.isupper()


def _read(data):
    """(header, transfer syntax, (VR, length as written, bytes) of PixelData), once all are known to be present."""
    file = _File(data)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    pixels = None
    try:
        dataset, syntax, pixels = _parse(file)
    except Exception:  # the end of the file can be met anywhere
        if not file.cut:
            raise
    if pixels is None and file.cut:
        raise ValueError("cut short: the file ends within the header")
    if pixels is None:  # so looks a file that is cut between two elements
        raise Unusable("the DICOM has no PixelData: cut short, or not an image")
    if missing := [name for name in NEEDED if dataset.get(name) in (None, "")]:
        raise Unusable(f"the DICOM has no {' and no '.join(missing)}")
    vr, length, start = pixels
    return dataset, syntax, (vr, length, memoryview(data)[start : start + length])


def _parse(file):
    """(header, transfer syntax, (VR, length, position) of PixelData or None)."""
    meta = filereader.read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2)
    syntax = UID(str(meta.get("TransferSyntaxUID") or ""))
    if not syntax:
        letters = file.getvalue()[file.tell() + 4 : file.tell() + 6]
        syntax = ExplicitVRLittleEndian if _is_vr(letters) else ImplicitVRLittleEndian
        warnings.warn(f"no transfer syntax: taken for {syntax.name}", stacklevel=2)
    if syntax not in READ:  # before reading on, which would inflate a deflated file
        raise Unusable(f"transfer syntax {syntax.name} is not supported")
    pixels = None

    def at_pixels(tag, vr, length):
        nonlocal pixels
        if tag == PIXEL_DATA:
            pixels = vr, length, file.tell()
        return tag >= PIXEL_DATA

    order = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    return filereader.read_dataset(file, *order, stop_when=at_pixels, specific_tags=HEADER), syntax, pixels


def _integer(dataset, name, default):
    value = dataset.get(name)
    return default if value is None or value == "" else int(value)


def _check_kind(dataset):
    """Raises where the header describes something else than one image of whole numbers, grayscale or RGB."""
    check_size(dataset.Rows, dataset.Columns)
    frames, samples = (_integer(dataset, name, 1) for name in ("NumberOfFrames", "SamplesPerPixel"))
    kind = photometric(dataset)
    colour = samples == 3 and kind in COLOUR
    if frames > 1 or (samples != 1 and not colour):
        raise Unusable(f"the DICOM is not a single grayscale image: {frames} frame(s), {samples} sample(s) a pixel")
    if not colour and kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unusable(f"PhotometricInterpretation is {kind!r}; expected MONOCHROME1 or MONOCHROME2, or RGB")
    if colour and (dataset.BitsAllocated, dataset.BitsStored) != (8, 8):
        raise Unusable(f"{dataset.BitsStored} of {dataset.BitsAllocated} bits a sample of {kind}; 8 of 8 are read")
    if dataset.BitsAllocated not in (1, 8, 16, 32) or not 1 <= dataset.BitsStored <= dataset.BitsAllocated:
        raise Unusable(f"{dataset.BitsStored} of {dataset.BitsAllocated} bits a pixel; all of 1, 8, 16 or 32 are read")


# ----------------------------------------------------------------------------------------------- the pixels
def _stored_values(dataset, syntax, pixels):
    """Integers [H, W], signed or not as in the header."""
    if syntax in UNCOMPRESSED:
        words, precision = _uncompressed(dataset, syntax, *pixels), dataset.BitsAllocated
    else:
        words, precision = _decompressed(dataset, syntax, *pixels)
    if words.ndim == 3:  # RGB of gray pixels, as a secondary capture of an X-ray has them
        if (np.ptp(words, axis=2) > 24).mean() > 0.05:  # a coloured mark or text may be in it
            raise Unusable("the DICOM is a colour image, and no X-ray is")
        return np.asarray(Image.fromarray(np.ascontiguousarray(words)).convert("L"))
    words = words.view(f"{'i' if _integer(dataset, 'PixelRepresentation', 0) == 1 else 'u'}{words.itemsize}")
    # PS3.5 8.1.1: the value is in some bits of the word, up to HighBit; the others may hold anything.
    bits = min(dataset.BitsStored, precision)
    end = _integer(dataset, "HighBit", bits - 1) + 1
    if precision == bits or not bits <= end <= precision:
        end = bits
    size = 8 * words.itemsize
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if words.dtype.kind == "i" else (0, (1 << bits) - 1)
    if end != bits or words.min() < least or words.max() > most:
        words = (words << (size - end)) >> (size - bits)
    return words


def _uncompressed(dataset, syntax, vr, length, data):
    """Words [H, W], unsigned; of RGB bytes [H, W, 3]."""
    samples = _integer(dataset, "SamplesPerPixel", 1)
    count, bits = dataset.Rows * dataset.Columns * samples, dataset.BitsAllocated
    needed = -(-count * bits // 8)
    if length == 0xFFFFFFFF:
        raise Unusable(f"the pixels are compressed, the transfer syntax is {syntax.name}")
    if len(data) < needed:
        what = f"{len(data):,} of {needed:,} bytes of pixels exist"
        raise ValueError(f"cut short: {what}") if len(data) < length else Unusable(f"the header is wrong: {what}")
    if bits == 1:
        words = np.unpackbits(np.frombuffer(data, np.uint8, needed), count=count, bitorder="little")
    elif bits == 8 and syntax == ExplicitVRBigEndian and vr == "OW":  # two in a word, the first in its lower half
        words = np.frombuffer(data, ">u2", len(data) // 2).astype("<u2").view(np.uint8)[:count]
    else:
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        words = np.frombuffer(data, f"{order}u{bits // 8}", count).astype(f"u{bits // 8}", copy=False)
    if samples == 1:
        return words.reshape(dataset.Rows, dataset.Columns)
    if photometric(dataset) not in ("RGB", "YBR_FULL"):
        raise Unusable(f"{photometric(dataset)} is read from compressed pixels only")
    if _integer(dataset, "PlanarConfiguration", 0) == 1:  # plane by plane
        words = np.moveaxis(words.reshape(3, dataset.Rows, dataset.Columns), 0, 2)
    else:
        words = words.reshape(dataset.Rows, dataset.Columns, 3)
    if photometric(dataset) == "RGB":
        return words
    return np.asarray(Image.frombytes("YCbCr", words.shape[1::-1], words.tobytes()).convert("RGB"))


def _decompressed(dataset, syntax, _vr, _length, data):
    """(words [H, W] of 8, 16 or 32 bits or RGB [H, W, 3], of how many of these the decoder makes use)."""
    samples = _integer(dataset, "SamplesPerPixel", 1)
    if bytes(data[:4]) != b"\xfe\xff\x00\xe0":
        raise Unusable(f"the pixels are not compressed, the transfer syntax is {syntax.name}")
    # One image: all fragments are of one frame, whatever the table of offsets before them has.
    _, *fragments = generate_fragments(bytes(data))
    frame = b"".join(fragments)
    if not frame.strip(b"\0"):
        raise ValueError("cut short: it has no compressed pixels")
    bits, signed = dataset.BitsAllocated, False
    if syntax != RLELossless:
        read = read_jpeg2000 if syntax in (JPEG2000Lossless, JPEG2000) else read_jpeg
        stream = read(frame)
        size = stream.height, stream.width
        if size != (dataset.Rows, dataset.Columns):
            raise ValueError(f"the pixels are {size}, the header has {(dataset.Rows, dataset.Columns)}")
        if stream.components != samples:
            raise Unusable(f"the DICOM is not a single grayscale image: {stream.components} samples a pixel")
        bits, signed = stream.precision, stream.signed
    try:
        words, _ = get_decoder(syntax).as_array(
            encapsulate([frame], has_bot=False),
            validate=False,
            rows=dataset.Rows,
            columns=dataset.Columns,
            number_of_frames=1,
            samples_per_pixel=samples,
            photometric_interpretation="MONOCHROME2" if samples == 1 else photometric(dataset),
            planar_configuration=_integer(dataset, "PlanarConfiguration", 0),
            bits_allocated=next(size for size in (8, 16, 32, 64) if bits <= size),
            bits_stored=bits,
            pixel_representation=int(signed),
            correct_unused_bits=False,
        )
    except RuntimeError as error:  # a line for each decoder that was tried, after the first
        reason = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(f"the compressed pixels are damaged or cut short: {reason[0].strip()}") from error
    return words, bits
