"""DICOM files written byte by byte, so that a test can put into them what no library would write.

An element is (name, VR, value): text, an integer or a list of them for US and SS, or bytes as they are.
"""

import struct

from pydicom.datadict import tag_for_keyword

LONG = ("OB", "OW", "SQ", "UN", "UT")
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"


def encode(elements, syntax=EXPLICIT):
    """Bytes of a data set; PixelData given as None gets no length (encapsulated frames follow)."""
    order, out = "<>"[syntax == BIG_ENDIAN], b""
    for name, vr, value in sorted(elements, key=lambda element: tag_for_keyword(element[0])):
        tag = tag_for_keyword(name)
        if isinstance(value, str):
            value = value.encode()
        elif not isinstance(value, bytes):
            numbers = [value] if isinstance(value, int) else value
            value = struct.pack(f"{order}{len(numbers)}{'h' if vr == 'SS' else 'H'}", *numbers)
        value += (b"\0" if vr in ("UI", "OB") else b" ") * (len(value) % 2)
        head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
        length = 0xFFFFFFFF if name == "PixelData" and value[:4] == b"\xfe\xff\x00\xe0" else len(value)
        if syntax == IMPLICIT:
            head += struct.pack("<I", length)
        elif vr in LONG:
            head += vr.encode() + b"\0\0" + struct.pack(f"{order}I", length)
        else:
            head += vr.encode() + struct.pack(f"{order}H", length)
        out += head + value
    return out


def items(*data_sets):
    """Value of a sequence of encoded data sets (little endian)."""
    return b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(item)) + item for item in data_sets)


def lut(count, first, bits, data, vr="OW"):
    """Value of a sequence with one lookup table."""
    first %= 65536
    return items(encode([("LUTDescriptor", "US", [count, first, bits]), ("LUTData", vr, data)]))


def encapsulated(*fragments):
    """Value of a compressed PixelData: an empty table of offsets, the fragments, the end."""
    return items(b"", *(f + b"\0" * (len(f) % 2) for f in fragments)) + b"\xfe\xff\xdd\xe0\0\0\0\0"


def image(pixels, *extra, bits=(16, 16, 15), signed=0, inverted=False, syntax=EXPLICIT, bare=False):
    """Bytes of a file with integers [H, W], or with a compressed `(value of PixelData, height, width)`.

    extra: further elements, which replace those of the same name. bare: without preamble, "DICM" and meta group.
    """
    order = "<>"[syntax == BIG_ENDIAN]
    if isinstance(pixels, tuple):
        data, height, width = pixels
    else:
        (height, width), data = pixels.shape, pixels.astype(f"{order}{'i' if signed else 'u'}{bits[0] // 8}").tobytes()
    elements = [
        ("SOPClassUID", "UI", "1.2.840.10008.5.1.4.1.1.1.1"),
        ("SOPInstanceUID", "UI", "1.2.3"),
        ("Modality", "CS", "DX"),
        ("SamplesPerPixel", "US", 1),
        ("PhotometricInterpretation", "CS", "MONOCHROME1" if inverted else "MONOCHROME2"),
        ("Rows", "US", height),
        ("Columns", "US", width),
        ("BitsAllocated", "US", bits[0]),
        ("BitsStored", "US", bits[1]),
        ("HighBit", "US", bits[2]),
        ("PixelRepresentation", "US", signed),
        ("PixelData", "OW", data),
    ]
    names = {name for name, _, _ in extra}
    elements = [e for e in elements if e[0] not in names] + [e for e in extra if e[2] is not None]
    body = encode(elements, syntax)
    if bare:
        return body
    meta = encode([("TransferSyntaxUID", "UI", syntax)])
    length = encode([("FileMetaInformationGroupLength", "UL", struct.pack("<I", len(meta)))])
    return bytes(128) + b"DICM" + length + meta + body
