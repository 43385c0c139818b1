"""One table of images, the same for every release: its form, how CSV files are read, the checks of every table.

Runs without torch. A release has a module of its own that reads it into a :class:`Table` (`mimic_cxr.py`).
"""

import csv
import dataclasses
import functools
import gzip
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import UserError
from dataset.files.stores import FileStore
from dataset.labels import BLANK, apply_policy
from dataset.views import VIEWS

SPLITS = ("train", "validate", "test")
SPLIT_ALIASES = {"val": "validate", "valid": "validate", "validation": "validate"}
# The arrays of a Table, one value an image.
ARRAYS = ("path", "dicom_id", "study", "subject", "split", "labels", "targets", "view")


class EmptySplit(UserError):
    """A table without an image of the split asked for."""


@dataclasses.dataclass
class Table:
    """One row an image. Arrays, not Python objects: forked workers then share their memory.

    path: bytes, relative to `root`; dicom_id, study, subject: bytes, names as they are written, empty where there is
    none; split: index into SPLITS; labels: [N, L] float32 of 1, 0, -1 (uncertain), NaN (not mentioned) and
    :data:`dataset.labels.UNKNOWN`;
    targets: see :meth:`with_targets`; view: text as of :func:`dataset.views.find_views`, None where no table tells it.
    population, primary_metric, label_groups: see `dataset.build.Dataset`.
    """

    root: Path
    sources: tuple  # paths of the CSV files
    label_names: tuple
    path: np.ndarray
    dicom_id: np.ndarray
    study: np.ndarray
    subject: np.ndarray
    split: np.ndarray
    labels: np.ndarray
    targets: np.ndarray | None = None
    view: np.ndarray | None = None
    store: object = None  # of dataset.files.stores, where the images are read; None: files below root
    left_out: dict = dataclasses.field(default_factory=dict)  # reason -> number of images
    notes: tuple = ()  # texts that the summary ends with
    # label -> {"from": its names in the release, "kind": exact, approximate or unknown}; empty: each is itself
    label_mapping: dict = dataclasses.field(default_factory=dict)
    population: str = ""
    primary_metric: str = ""
    label_groups: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.store = self.store or FileStore(self.root)
        self.label_mapping = self.label_mapping or {
            name: {"from": [name], "kind": "exact"} for name in self.label_names
        }

    def __len__(self):
        return len(self.path)

    def select(self, keep):
        """The rows where `keep` is true."""
        kept = {name: None if (column := getattr(self, name)) is None else column[keep] for name in ARRAYS}
        return dataclasses.replace(self, **kept, left_out=dict(self.left_out))

    def limited(self, count):
        """At most `count` rows of each split, of patients (or images, without ids) in a random order that is fixed."""
        units, unit = np.unique(np.where(self.subject == b"", self.path, self.subject), return_inverse=True)
        order = np.random.default_rng(0).permutation(len(units))[unit].argsort(kind="stable")
        kept = np.zeros(len(self), bool)
        for k in range(len(SPLITS)):
            kept[order[self.split[order] == k][:count]] = True
        table = self.select(kept)
        table.left_out[f"beyond DATA.LIMIT {count:,} of its split"] = int((~kept).sum())
        return table

    def with_targets(self, uncertain="zeros", missing="zeros"):
        """The table with its targets: [N, L] float32 of 0, 1, NaN = unknown and, in train, values between.

        uncertain, missing: the policy for -1 and for blank labels, see :func:`dataset.labels.apply_policy`.
        """
        train = self.split == SPLITS.index("train")
        targets = np.empty_like(self.labels)
        for rows in (train, ~train):
            targets[rows] = apply_policy(
                self.labels[rows], self.label_names, uncertain=uncertain, missing=missing, soft=rows is train
            )
        return dataclasses.replace(self, targets=targets)

    def patients(self):
        """{split: names of its patients, or of its images where patients are unknown: bytes, sorted}."""
        names = self.subject if (self.subject != b"").all() else self.dicom_id
        return {name: np.unique(names[self.split == k]) for k, name in enumerate(SPLITS)}

    @functools.cached_property
    def cohort(self):
        """What a report says of the data: counts, views and positives of every split, and what was left out."""

        def count(ids):
            return len(np.unique(ids)) if (ids != b"").all() else None

        splits = {}
        for k, name in enumerate(SPLITS):
            if not (rows := self.split == k).any():
                continue
            found = splits[name] = {"images": int(rows.sum())}
            found |= {"studies": count(self.study[rows]), "patients": count(self.subject[rows])}
            found["labels"] = {
                label: count_values(self.targets[rows, k], self.labels[rows, k])
                for k, label in enumerate(self.label_names)
            }
            if self.view is not None:
                found["groups"] = {"view": count_groups(self.view[rows].astype(str))}
        return {"splits": splits, "left_out": {reason: int(n) for reason, n in self.left_out.items()}}

    def summary(self):
        """The table in a few lines: images, studies, patients and positives by split, and what was left out."""
        nothing = {"images": 0, "studies": 0, "patients": 0, "labels": {}}
        splits = [self.cohort["splits"].get(name, nothing) for name in SPLITS]

        def share(label):
            known, positives = (label.get(kind, 0) for kind in ("known", "positives"))
            return f"{positives:,} ({positives / known:.1%})" if known else "-"

        lines = [("", *SPLITS)]
        for what in ("images", "studies", "patients"):
            lines.append((what, *("unknown" if s[what] is None else f"{s[what]:,}" for s in splits)))
        lines.append(("positive labels", "", "", ""))
        for name in self.label_names:
            lines.append((f"  {name}", *(share(s["labels"].get(name, {})) for s in splits)))
        texts = [aligned(lines), "from " + ", ".join(path.name for path in self.sources), *self.notes]
        left_out = "; ".join(f"{n:,} {reason}" for reason, n in self.left_out.items() if n)
        return "\n".join([*texts, f"left out: {left_out or 'nothing'}"])


def count_values(targets, labels=None):
    """Counts of one label: known and positive targets [N]; uncertain and blank values of the label file [N]."""
    known, positives = int(np.isin(targets, (0, 1)).sum()), int((targets == 1).sum())
    found = {"known": known, "positives": positives, "prevalence": positives / known if known else None}
    if labels is not None:
        found |= {"uncertain": int((labels == -1).sum()), "blank": int(np.isnan(labels).sum())}
    return found


def count_groups(names):
    """{name: its images and their share} of the names [N] of groups, sorted."""
    groups, counts = np.unique(np.asarray(names, str), return_counts=True)
    return {str(g): {"images": int(n), "share": float(n / counts.sum())} for g, n in zip(groups, counts)}


def aligned(lines, gap="   "):
    """Rows of cells as text: the first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(gap.join([line[0].ljust(first), *map(str.rjust, line[1:], others)]).rstrip() for line in lines)


def split_index(split):
    """Index of a split by name; `val` and `valid` mean the official `validate`."""
    name = SPLIT_ALIASES.get(split, split)
    if name not in SPLITS:
        raise UserError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    return SPLITS.index(name)


# ------------------------------------------------------------------------------------------ reading a CSV file
def _open(path, encoding):
    """The file as text: UTF-16 by its first bytes, else of this encoding; unpacked where it is gzip."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\3\4":
        raise ValueError("it is a zip file, or the workbook of a spreadsheet; unpack it, or save the sheet as CSV")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif b"\0" in start[:2]:  # the first character is a letter
        encoding = "utf-16-le" if start[1] == 0 else "utf-16-be"
    return opener(path, "rt", encoding=encoding, newline="")


def _read_header(file):
    """(names of the columns, separator) from the first line that is not blank, nor a spreadsheet's `sep=;`."""
    line = next((line for line in iter(file.readline, "") if line.strip() and not line.startswith("sep=")), "")
    separator = max(",;\t", key=line.count)
    return [name.strip() for name in next(csv.reader([line], delimiter=separator), [])], separator


def read_csv(path, required, *, rows=True, encoding="utf-8-sig"):
    """A CSV file as a table of texts, with at least the columns `required`: the one reader of tables.

    Separated by commas, semicolons or tabs. A value that is not there is an empty text; rows of such alone are none.

    rows: False reads the header alone. encoding: what is not UTF-8 is read as Latin-1 if the header is ASCII.

    UserError: not a CSV file, no such column, or no rows.
    """
    try:
        with _open(path, encoding) as file, warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # it would cut off what is too much
            columns, separator = _read_header(file)
            if encoding == "latin-1" and not "".join(columns).isascii():
                raise ValueError("it is not UTF-8 text; save it as such")
            if not rows:
                return pd.DataFrame(columns=columns)
            # One column more than there are names: rows may end in a separator.
            frame = pd.read_csv(file, sep=separator, header=None, names=range(len(columns) + 1), index_col=False,
                                dtype=str, keep_default_na=False, skipinitialspace=True, low_memory=False)  # fmt: skip
    except pd.errors.EmptyDataError:
        frame = pd.DataFrame(columns=range(len(columns) + 1))
    except UnicodeDecodeError as error:
        if encoding == "latin-1":  # damaged UTF-16
            raise UserError(f"{path}: cannot be read as CSV ({error})") from error
        return read_csv(path, required, rows=rows, encoding="latin-1")
    except pd.errors.ParserWarning as error:
        raise _too_many(path, "a row", columns, separator) from error
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as error:
        if longer := re.search(r"Expected \d+ fields in line (\d+)", str(error)):
            raise _too_many(path, f"data row {longer[1]}", columns, separator) from error
        raise UserError(f"{path}: cannot be read as CSV ({str(error).strip()})") from error
    frame = frame.fillna("")
    beyond = frame.pop(len(columns)).str.strip() != ""
    if beyond.any():
        raise _too_many(path, f"data row {first_row(beyond) + 1}", columns, separator)
    frame.columns = columns
    if columns and (blank := frame.iloc[:, 0] == "").any():
        frame = frame[~(blank & (frame == "").all(axis=1))].reset_index(drop=True)
    need_columns(frame, required, path)
    if frame.empty:
        raise UserError(f"{path}: the file has no rows")
    return frame


def _too_many(path, row, columns, separator):
    return UserError(
        f"{path}: {row} has more values than there are columns ({len(columns)}): a value that holds {separator!r} must "
        "be in quotes, and each column must have a name"
    )


def need_columns(frame, required, path):
    for name in required:
        count = list(frame.columns).count(name)
        if count != 1:
            fault = "is missing" if not count else "is there more than once"
            raise UserError(f"{path}: column {name!r} {fault} (the file has: {', '.join(frame.columns)})")


def first_row(bad):
    """Position of the first bad row."""
    return int(np.flatnonzero(bad)[0])


ROUNDED = r"\d(?:[.,]\d+)?[eE]\+\d+"  # how a spreadsheet writes a long number


def names(frame, column, path, remedy=""):
    """A column of names as they are written, none of them empty. The same text is the same image, study or patient.

    UserError: an empty one, or one that a spreadsheet has rounded, by which several become one.
    """
    values = frame[column].str.strip()
    empty, rounded = values == "", values.str.fullmatch(ROUNDED)
    if empty.any():
        raise UserError(f"{path}: {column} is empty in data row {first_row(empty) + 1}{remedy}")
    if rounded.any():
        raise UserError(
            f"{path}: {column} is {values[rounded].iloc[0]!r} in data row {first_row(rounded) + 1}: a spreadsheet has "
            "rounded it, so that different ids look alike; use the file as downloaded, or import the column as text"
        )
    return values


def no_duplicates(values, what, path):
    repeated = values[values.duplicated()]
    if len(repeated):
        raise UserError(f"{path}: {what} {repeated.iloc[0]} has more than one row ({len(repeated)} rows too many)")


def integers(frame, column):
    """(the column as integers, where it holds none)."""
    values = pd.to_numeric(frame[column], errors="coerce").where(~frame[column].str.strip().str.fullmatch(ROUNDED))
    bad = ~((values % 1 == 0) & (values.abs() < 2**53))  # larger ones are not exact
    return values.where(~bad, -1).astype(np.int64), bad


def integer_ids(frame, column, path):
    """A column of integers."""
    values, bad = integers(frame, column)
    if bad.any():
        row = first_row(bad)
        raise UserError(
            f"{path}: {column} is {frame[column].iloc[row]!r} in data row {row + 1}; expected an integer id"
        )
    return values


def read_label(text):
    """1, 0, -1 or NaN (blank) for the text of a label; None for any other."""
    text = text.strip().lower().replace(",", ".")  # 1,0 beside semicolons
    if text in BLANK:
        return np.nan
    try:
        return float(text) if float(text) in (1, 0, -1) else None
    except ValueError:
        return None


def label_values(frame, label_names, path, remedy=""):
    """[N, L] float32 of 1, 0, -1, NaN; anything else is an error that names column, row and value."""
    need_columns(frame, label_names, path)
    values = np.empty((len(frame), len(label_names)), np.float32)
    for k, name in enumerate(label_names):
        codes, texts = pd.factorize(frame[name])  # of few different ones
        read = [read_label(text) for text in texts]
        if None in read:
            row = first_row(codes == read.index(None))
            raise UserError(
                f"{path}: label {name!r} is {texts[codes[row]]!r} in data row {row + 1}; "
                f"expected 1, 0, -1 (uncertain) or nothing{remedy}"
            )
        values[:, k] = np.array(read, np.float32)[codes]
    return values


def clear_findings(values, label_names, healthy):
    """Puts 0 for the blanks of the rows that are `healthy` in values [N, L], but for Support Devices."""
    findings = [k for k, name in enumerate(label_names) if name not in ("No Finding", "Support Devices")]
    cleared = values[np.ix_(healthy, findings)]
    values[np.ix_(healthy, findings)] = np.where(np.isnan(cleared), 0, cleared)


def split_names(frame):
    """The column `split` with its aliases replaced; other names stay as they are."""
    return frame["split"].str.strip().replace(SPLIT_ALIASES)


def read_splits(frame, path):
    """The column `split`, of names of SPLITS; any other is an error."""
    found = split_names(frame)
    bad = ~found.isin(SPLITS)
    if bad.any():
        row = first_row(bad)
        raise UserError(f"{path}: split is {frame['split'].iloc[row]!r} in data row {row + 1}; use {', '.join(SPLITS)}")
    return found


def to_bytes(texts):
    return np.array([text.encode() for text in texts], dtype=np.bytes_)


# ---------------------------------------------------------------------------------------- checks of every table
def select_views(table, views):
    """The images of the views asked for, a key of :data:`dataset.views.VIEWS`."""
    keep = np.isin(table.view, VIEWS[views])
    table, here = table.select(keep), table.view
    table.left_out[f"image of another view (DATA.VIEWS {views})"] = int((~keep & (here != "")).sum())
    table.left_out["image of unknown view"] = int((here == "").sum())
    if len(table) == 0:
        raise UserError(f"DATA.VIEWS {views}: {table.root} has no image of it")
    return table


def check_patients(table):
    """No patient in two splits: the score on the test split would measure memory."""
    known = table.subject != b""
    subjects, patient = np.unique(table.subject[known], return_inverse=True)
    pairs = np.unique(np.stack([patient, table.split[known]], 1), axis=0)
    shared = np.flatnonzero(np.bincount(pairs[:, 0]) > 1)
    if len(shared):
        where = ", ".join(SPLITS[s] for s in pairs[pairs[:, 0] == shared[0], 1])
        raise UserError(
            f"{len(shared)} patient(s) are in more than one split, such as subject_id {subjects[shared[0]].decode()} "
            f"in {where}; put all images of a patient into one split"
        )


def check_files(table, allow_missing=False):
    """The table of the images that are there; one that is missing is an error, or with allow_missing left out."""
    rows = table.store.rows_to_check(len(table)) if not allow_missing else np.arange(len(table))
    missing = table.store.missing(table.path[rows])
    if allow_missing:
        table = table.select(~missing)
        table.left_out["image file missing (DATA.ALLOW_MISSING)"] = int(missing.sum())
        if len(table) == 0:
            raise UserError(f"{table.root}: none of the images of the table is there")
    elif missing.any():
        raise UserError(
            f"image missing: {table.root / table.path[rows][missing][0].decode()} ({missing.sum()} of {len(rows)} "
            f"looked for {table.store.place}). Complete the data, or leave out the images that are not there: "
            "DATA.ALLOW_MISSING True, with prepare_mimic.py --allow-missing"
        )
    return table


def check_table(table, allow_missing=False):
    """The table of the images that are there, once every check has passed."""
    # No path leads out of the data folder by `..`; absolute ones are the user's own choice.
    for path in table.path[np.char.find(table.path, b"..") >= 0]:
        if b".." in path.split(b"/"):
            raise UserError(f"{table.sources[0]}: the path {path.decode()!r} leads out of the data folder by ..")
    check_patients(table)
    return check_files(table, allow_missing)
