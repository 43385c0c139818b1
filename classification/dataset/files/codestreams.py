"""The size of a compressed image, and whether it is complete, before it is decoded.

Decoders allocate memory for the size in the compressed data, whatever the file's header has. Several of them invent
pixels for data that end early. Runs without torch.
"""

import re
import struct
import zlib
from typing import NamedTuple

MAX_PIXELS = 100_000_000  # a chest X-ray has about 10 million; more is a broken header or a bomb

MARKER = re.compile(rb"\xff([\x80-\xcf\xd8-\xfe])")  # not the restart markers, nor what stuffing leaves inside data
JPEG_FRAMES = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # starts of frame: JPEG-LS and JPEG
END = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000 alike; it cannot occur within compressed data


class Unusable(ValueError):
    """A fault of an image that another copy of the file would not mend."""


class Codestream(NamedTuple):
    """The header of a compressed image."""

    height: int
    width: int
    components: int
    precision: int  # bits a pixel
    signed: bool = False


def check_size(height, width):
    """Raises Unusable for an image that is empty or too large to read."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise Unusable(f"the header has {height} x {width} pixels; at most {MAX_PIXELS:,} are read")


def read_jpeg(data):
    """The :class:`Codestream` of JPEG (ISO 10918-1, annex B) or JPEG-LS (ISO 14495-1, annex C).

    ValueError: cut short, or no JPEG.
    """
    position, frame = 2, None
    while found := MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        if marker == 0xD8:  # a start of image, the one marker here without a segment
            continue
        if len(data) < position + 2:
            break
        if marker in JPEG_FRAMES and frame is None:
            if len(data) < position + 8:
                break
            precision, height, width, components = struct.unpack_from(">xxBHHB", data, position)
            frame = Codestream(height, width, components, precision)
        if marker == 0xDA:  # start of scan: compressed data follow
            _check_end(data, position, "JPEG")
            if frame is None:
                raise ValueError("the JPEG data have no start of frame")
            return frame
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    raise ValueError("cut short: truncated within the header of the JPEG data")


def read_jpeg2000(data):
    """The :class:`Codestream` of JPEG 2000 (ISO 15444-1, annex A). ValueError: cut short, or no JPEG 2000."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0:
        raise ValueError("the JPEG 2000 data have no header")
    if len(data) < start + 43:
        raise ValueError("cut short: truncated within the header of the JPEG 2000 data")
    right, lower, left, upper = struct.unpack_from(">4I", data, start + 8)
    components, depth = struct.unpack_from(">HB", data, start + 40)
    _check_end(data, start + 43, "JPEG 2000")
    return Codestream(lower - upper, right - left, components, (depth & 127) + 1, depth > 127)


def _check_end(data, start, what):
    if data.rfind(END, start) < 0:
        raise ValueError(f"cut short: the {what} data are truncated, their end marker is missing")


def check_png(data):
    """Raises a ValueError if a PNG file (ISO 15948) is cut short or its pixels are damaged."""
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return
        end = position + 8 + length
        if not kind.isalpha() or end + 4 > len(data):
            break
        if kind == b"IDAT" and zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("the PNG data are damaged: a checksum is wrong")
        position = end + 4
    raise ValueError("cut short: the PNG data are truncated")
