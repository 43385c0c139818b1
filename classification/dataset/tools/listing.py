"""What a command line names -> images: files, folders, patterns, tables with a `path` column. Runs without torch."""

import glob
import io
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pydicom

from common.errors import UserError
from dataset import tables
from dataset.files.images import SUFFIXES, ImageError, sniff
from dataset.views import TEXT_COLUMNS, find_views

TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
IDS = ("dicom_id", "study_id", "subject_id", "view")
_OFFICIAL = re.compile(r"p\d\d/p(?P<subject_id>\d{8})/s(?P<study_id>\d{8})/(?P<dicom_id>[^/]+)\.\w+$")
_HEADER = {"dicom_id": "SOPInstanceUID", "study_id": "StudyID", "subject_id": "PatientID"}


@dataclass(frozen=True)
class Listed:
    """An image that was asked for: `path` as the user writes it, `file` where it lies, `known` what a table says of it
    (a dictionary of some of IDS)."""

    path: str
    file: Path
    known: dict = field(default_factory=dict)

    def read(self):
        """Bytes of the file; an ImageError where it cannot be read."""
        try:
            if not stat.S_ISREG(self.file.stat().st_mode):  # to read a pipe could take for ever
                raise ImageError(f"{self.file}: is no file")
            return self.file.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a table may hold a path that no system takes
            raise ImageError(f"{self.file}: {getattr(error, 'strerror', None) or error}") from error


def _looks_like_an_image(path):
    # A broken image is known by its name only, one without a suffix by its content only.
    if path.suffix and path.suffix.lower() in SUFFIXES:
        return os.path.isfile(path) or os.path.islink(path)
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return sniff(file.read(4096)) != ""
    except OSError:
        return False


def _cannot_be_listed(error):
    raise UserError(f"{error.filename}: the folder cannot be read ({error.strerror})") from error


def _images_below(folder):
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_be_listed):
        if (real := os.path.realpath(where)) in seen:  # a link to where the search has been: a circle, perhaps
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(where, name) for name in sorted(names) if not name.startswith("."))
        found += [Listed(str(path), path) for path in paths if _looks_like_an_image(path)]
    return found


def _is_table(name):
    return name.lower().endswith(TABLES)


def _of_table(table):
    frame = tables.read_csv(table, ("path",))
    frame["path"] = tables.names(frame, "path", table)
    if "ViewPosition" in frame and "view" not in frame:
        frame["view"] = find_views(frame)
    columns = [c for c in IDS if c in frame]
    return [
        Listed(row["path"], table.parent / row["path"], {c: row[c].strip() for c in columns if row[c].strip()})
        for row in frame[["path", *columns]].to_dict("records")
    ]


def _of_pattern(pattern):
    """What a pattern names: of folders and of files what looks like an image; tables where it asks for them."""
    found = []
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        if path.is_dir():
            found += _images_below(path)
        elif _is_table(pattern):
            found += _of_table(path)
        elif _looks_like_an_image(path):
            found.append(Listed(str(path), path))
    if not found:
        raise UserError(f"{pattern}: no image matches this pattern (DICOM, JPG or PNG)")
    return found


def _expand(name):
    path = Path(name)
    if os.path.isdir(name):
        if images := _images_below(path):
            return images
        raise UserError(f"{name}: no image in this folder or below it (DICOM, JPG or PNG)")
    if os.path.isfile(name) and _is_table(name):
        return _of_table(path)
    if os.path.lexists(name):
        return [Listed(name, path)]
    if glob.has_magic(name):
        return _of_pattern(name)
    raise UserError(f"{name}: does not exist")


def list_images(names):
    """The images that files, folders, patterns (`*`, `**`) and tables name, each path once, in the order given.

    Folders are searched to the bottom, for files with the suffix or the content of an image; hidden ones are left out.
    A table is a CSV with the column `path`, relative to the folder of the table; it may have those of IDS, or
    ViewPosition.

    Raises:
        UserError: a path that is not there, a folder without an image or that cannot be read, a table without `path`.
    """
    listed = [image for name in names for image in _expand(str(name))]
    # Tables of two folders may call two images alike.
    return list({(image.path, os.path.abspath(image.file)): image for image in listed}.values())


def identify(listed, data):
    """{id: text} of IDS for an image with the bytes `data`; an empty text where nothing tells.

    Its row of a table comes first, then the folders of the official layout, then the header of a DICOM.
    """
    ids = dict.fromkeys(IDS, "")
    if sniff(data) == "dcm":
        try:
            header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
        except Exception:  # whatever pydicom raises: reading the image says it better
            header = {}
        ids |= {name: _text(header, tag) for name, tag in _HEADER.items()}
        ids["view"] = _view(header)
    official = _OFFICIAL.search(listed.file.as_posix())
    return ids | (official.groupdict() if official else {}) | listed.known


def _text(header, *names):
    """An element of a header as text, through the first items of sequences; empty where it cannot be read as such."""
    try:
        for name in names[:-1]:
            header = header.get(name)[0]
        return str(header.get(names[-1]) or "")
    except Exception:  # pydicom raises whatever it meets in an element of a wrong length or kind
        return ""


def _view(header):
    texts = {name: _text(header, name) for name in ("ViewPosition", "PerformedProcedureStepDescription")}
    texts["ViewCodeSequence_CodeMeaning"] = _text(header, "ViewCodeSequence", "CodeMeaning")
    return find_views(pd.DataFrame([texts | dict.fromkeys(set(TEXT_COLUMNS) - texts.keys(), "")]))[0]
