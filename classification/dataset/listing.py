"""What a command line names -> images: files, folders, patterns, tables with a `path` column. Runs without torch."""

import glob
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pydicom

from dataset.images import ImageError, sniff
from dataset.tables import read_csv
from dataset.views import TEXT_COLUMNS, find_views
from errors import UserError

SUFFIXES = (".dcm", ".dicom", ".jpg", ".jpeg", ".png")
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
            return self.file.read_bytes()
        except OSError as error:
            raise ImageError(f"{self.file}: {error.strerror or error}") from error


def _looks_like_an_image(path):
    # A broken image is known by its name only, one without a suffix by its content only.
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            return sniff(file.read(4096)) != ""
    except OSError:
        return False


def _of_folder(folder):
    found = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(where, name) for name in sorted(names) if not name.startswith("."))
        found += [Listed(str(path), path) for path in paths if _looks_like_an_image(path)]
    if not found:
        raise UserError(f"{folder}: no image in this folder or below it (DICOM, JPG or PNG)")
    return found


def _of_table(table):
    frame = read_csv(table, ("path",))
    blank = frame["path"].isna()
    if blank.any():
        raise UserError(f"{table}: data row {int(blank.to_numpy().argmax()) + 1} has no path")
    if "ViewPosition" in frame and "view" not in frame:
        frame["view"] = find_views(frame)
    columns = [c for c in IDS if c in frame]
    rows = frame[["path", *columns]].astype(object)
    return [
        Listed(row["path"], table.parent / row["path"], {c: _text(row[c]) for c in columns if pd.notna(row[c])})
        for row in rows.to_dict("records")
    ]


def _text(value):
    # A column of numbers with a gap in it is read as floats.
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _expand(name):
    path = Path(name)
    if path.is_dir():
        return _of_folder(path)
    if path.name.lower().endswith((".csv", ".csv.gz")) and path.is_file():
        return _of_table(path)
    if path.exists():
        return [Listed(str(path), path)]
    matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if not matches:
        raise UserError(f"{name}: {'nothing matches this pattern' if glob.has_magic(name) else 'does not exist'}")
    return [listed for match in matches for listed in _expand(match)]


def list_images(names):
    """The images that files, folders, patterns (`*`, `**`) and tables name, each path once, in the order given.

    Folders are searched to the bottom, for files with the suffix or the content of an image. A table is a CSV with
    the column `path`, relative to the folder of the table; it may have those of IDS, or ViewPosition.

    Raises:
        UserError: a path that is not there, a folder without an image, a table without `path`.
    """
    listed = [image for name in names for image in _expand(str(name))]
    return list({image.path: image for image in listed}.values())


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
        ids |= {name: str(header.get(tag) or "") for name, tag in _HEADER.items()}
        ids["view"] = _view(header)
    official = _OFFICIAL.search(listed.file.as_posix())
    return ids | (official.groupdict() if official else {}) | listed.known


def _view(header):
    texts = {name: str(header.get(name) or "") for name in ("ViewPosition", "PerformedProcedureStepDescription")}
    codes = header.get("ViewCodeSequence") or []
    texts["ViewCodeSequence_CodeMeaning"] = str(codes[0].get("CodeMeaning") or "") if codes else ""
    return find_views(pd.DataFrame([texts | dict.fromkeys(set(TEXT_COLUMNS) - texts.keys(), "")]))[0]
