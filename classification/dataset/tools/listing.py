"""What a command line names -> images: files, folders, patterns, tables with a `path` column. Runs without torch."""

import glob
import os
import re
import stat
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageFile

from common.errors import UserError
from common.folders import walk
from dataset.files.contents import read_header, text_of
from dataset.files.images import SUFFIXES, ImageError, sniff
from dataset.views import find_views

TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
IDS = ("dicom_id", "study_id", "subject_id", "view")
_OFFICIAL = re.compile(r"p\d\d/p(?P<subject_id>\d{8})/s(?P<study_id>\d{8})/(?P<dicom_id>[^/]+)\.\w+$")
# A broken image is known by the ending of its name only.
_ENDINGS = {ending.lower() for ending in SUFFIXES if ending} | {".gif", ".dib", ".jfif", ".j2k", ".ppm", ".pnm"}
_DRAWINGS = ("EPS", "MPEG")  # which Pillow opens, and does not read
_HEADER = {"dicom_id": "SOPInstanceUID", "study_id": "StudyID", "subject_id": "PatientID"}


@dataclass(frozen=True)
class Listed:
    """An image that was asked for: `path` as the user writes it, its `file`, `known`: what a table has of it
    (a dictionary of some of IDS)."""

    path: str
    file: Path
    known: dict = field(default_factory=dict)

    def stamp(self):
        """What shows that the image is another one: [path, size, time of change in ns, known]; JSON keeps it."""
        try:
            found = self.file.stat()
            return [self.path, found.st_size, found.st_mtime_ns, self.known]
        except (OSError, ValueError):
            return [self.path, None, None, self.known]

    def read(self):
        """Bytes of the file; an ImageError where it cannot be read."""
        try:
            if not stat.S_ISREG(self.file.stat().st_mode):  # to read a pipe could take for ever
                raise ImageError(f"{self.file}: is no file")
            return self.file.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a table may hold a path that no system takes
            raise ImageError(f"{self.file}: {getattr(error, 'strerror', None) or error}") from error


def _looks_like_an_image(path):
    if path.suffix.lower() in _ENDINGS:
        return os.path.isfile(path) or os.path.islink(path)
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            if sniff(file.read(4096)):
                return True
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("ignore")
            return not isinstance(picture, ImageFile.StubImageFile) and picture.format not in _DRAWINGS
    except Exception:  # Pillow's plugins raise whatever they meet
        return False


def _sorted_out(paths, left_out):
    """The images among files, as Listed; the others are counted by kind in `left_out`."""
    found = []
    for path in paths:
        if not path.name.startswith(".") and _looks_like_an_image(path):
            found.append(Listed(str(path), path))
        elif not os.path.isdir(path):
            hidden = path.name.startswith(".")
            left_out["hidden" if hidden else path.suffix.lower() or "without an ending"] += 1
    return found


def _images_below(folder, left_out):
    found = []
    for where, folders, names in walk(folder):
        left_out.update("hidden" for name in folders if name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += _sorted_out((Path(where, name) for name in names), left_out)
    return found


def _of_table(table, images):
    from dataset import tables  # pandas takes longer to import than ten images to predict
    from dataset.cxr_lt import find_images

    frame, folder = tables.read_csv(table, ()), table.parent
    own_name = "fpath" in frame and "path" not in frame
    frame = frame.rename(columns={"fpath": "path"} if own_name else {})
    tables.need_columns(frame, ("path",), table)
    frame["path"] = tables.names(frame, "path", table)
    if images or own_name:  # of CXR-LT, whose images lie elsewhere
        folder, dicom = find_images(folder, images), frame["path"].str.replace(r"\.jpg$", ".dcm", regex=True)
        if any((folder / path).is_file() for path in dicom[:20]):
            frame["path"] = dicom
        if "study_id" in frame:
            frame["study_id"] = frame["study_id"].str.removeprefix("s")
    if "ViewPosition" in frame and "view" not in frame:
        frame["view"] = find_views(frame)
    columns = [c for c in IDS if c in frame]
    return [
        Listed(row["path"], folder / row["path"], {c: row[c].strip() for c in columns if row[c].strip()})
        for row in frame[["path", *columns]].to_dict("records")
    ]


def _expand(name, left_out, images):
    """The images that a path names, or a pattern: of folders and files what looks like one, of a table its rows."""
    path, mine, found = Path(name), Counter(), []
    pattern = not os.path.lexists(name) and glob.has_magic(name)
    if not pattern and not os.path.lexists(name):
        raise UserError(f"{name}: does not exist")
    for one in map(Path, sorted(glob.glob(name, recursive=True))) if pattern else [path]:
        if one.is_dir():
            found += _images_below(one, mine)
        elif one.is_file() and name.lower().endswith(TABLES):
            found += _of_table(one, images)
        else:
            found += _sorted_out([one], mine) if pattern else [Listed(name, path)]
    if not found:
        what = "no image in this folder or below it" if path.is_dir() else "no image matches this pattern"
        raise UserError(f"{name}: {what} ({count_kinds(mine) or 'it is empty'}); name what holds DICOM, JPG or PNG")
    left_out.update(mine)
    return found


def list_images(names, left_out=None, images=""):
    """The images that files, folders, patterns (`*`, `**`) and tables name, each path once, in the order given.

    left_out: a Counter to which the files are added that are no images, by their ending. images: the folder of those of
    CXR-LT's tables, see `dataset.cxr_lt.find_images`.

    Folders are searched to the bottom, for files with the ending or the content of an image; hidden ones are left out.
    A table is a CSV with the column `path`, relative to the folder of the table; it may have those of IDS, or
    ViewPosition.

    UserError: no such path, a folder without an image or that cannot be read, a table without `path`.
    """
    left_out = Counter() if left_out is None else left_out
    listed = [image for name in names for image in _expand(str(name), left_out, images)]
    # Tables of two folders may call two images alike.
    return list({(image.path, os.path.abspath(image.file)): image for image in listed}.values())


def count_kinds(kinds):
    """A Counter as text, the most frequent first: "12 .txt, 2 hidden"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common() if count)


def identify(listed, data):
    """{id: text} of IDS for an image with the bytes `data`; an empty text where it is unknown.

    Its row of a table comes first, then the folders of the official layout, then the header of a DICOM.
    """
    ids = dict.fromkeys(IDS, "")
    if (header := read_header(data)) is not None:
        ids |= {name: text_of(header, keyword) for name, keyword in _HEADER.items()}
        ids["view"] = _view(header)
    official = _OFFICIAL.search(listed.file.as_posix())
    return ids | (official.groupdict() if official else {}) | listed.known


def _view(header):
    import pandas as pd

    texts = {name: text_of(header, name) for name in ("ViewPosition", "PerformedProcedureStepDescription")}
    return find_views(pd.DataFrame([texts | {"ViewCodeSequence_CodeMeaning": text_of(header, "ViewCodeSequence")}]))[0]
