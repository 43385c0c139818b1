"""One table of images, whatever it is read from: its form, the checks of every table, and the user's own CSV.

Runs without torch. A release has a module of its own that reads it into a :class:`Table` (`mimic_cxr.py`).
"""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from dataset.labels import apply_policy
from dataset.views import VIEWS, find_views
from errors import UserError

SPLITS = ("train", "validate", "test")
SPLIT_ALIASES = {"val": "validate", "valid": "validate", "validation": "validate"}
CHECKED_FILES = 500
COLUMNS = ("path", "dicom_id", "study", "subject", "split", "labels", "targets", "view")  # the arrays of a Table


class EmptySplit(UserError):
    """A table without an image of the split asked for."""


@dataclasses.dataclass
class Table:
    """One row an image. Arrays, not Python objects: forked workers then share their memory.

    path: bytes, relative to `root`; split: index into SPLITS; labels: [N, L] float32 of 1, 0, -1 (uncertain),
    NaN (not mentioned); subject and study: -1 where the file has none; targets: see :meth:`with_targets`;
    view: text as of :func:`dataset.views.find_views`, None where no table tells it.
    """

    root: Path
    sources: tuple  # names of the CSV files
    label_names: tuple
    path: np.ndarray
    dicom_id: np.ndarray
    study: np.ndarray
    subject: np.ndarray
    split: np.ndarray
    labels: np.ndarray
    targets: np.ndarray | None = None
    view: np.ndarray | None = None
    left_out: dict = dataclasses.field(default_factory=dict)  # reason -> number of images

    def __len__(self):
        return len(self.path)

    def select(self, keep):
        """The rows where `keep` is true."""
        kept = {name: None if (column := getattr(self, name)) is None else column[keep] for name in COLUMNS}
        return dataclasses.replace(self, **kept, left_out=dict(self.left_out))

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

    def cohort(self):
        """What a report says of the data: counts, views and positives of every split, and what was left out."""

        def count(ids):
            return len(np.unique(ids)) if (ids >= 0).all() else None

        splits = {}
        for k, name in enumerate(SPLITS):
            rows = self.split == k
            found = {
                "images": int(rows.sum()),
                "studies": count(self.study[rows]),
                "patients": count(self.subject[rows]),
            }
            found["labels"] = {}
            for label, target in zip(self.label_names, self.targets[rows].T):
                known, positives = int(np.isin(target, (0, 1)).sum()), int((target == 1).sum())
                prevalence = positives / known if known else None
                found["labels"][label] = {"known": known, "positives": positives, "prevalence": prevalence}
            if self.view is not None and rows.any():
                views, counts = np.unique(self.view[rows].astype(str), return_counts=True)
                shares = counts / counts.sum()
                found["groups"] = {
                    "view": {v: {"images": int(n), "share": float(s)} for v, n, s in zip(views, counts, shares)}
                }
            if found["images"]:
                splits[name] = found
        return {"splits": splits, "left_out": {reason: int(n) for reason, n in self.left_out.items()}}

    def summary(self):
        """The table in a few lines: images, studies, patients and positives by split, and what was left out."""

        def count(ids):
            return f"{len(np.unique(ids)):,}" if (ids >= 0).all() else "unknown"

        def share(targets):
            positive, negative = (targets == 1).sum(), (targets == 0).sum()
            return f"{positive:,} ({positive / (positive + negative):.1%})" if positive + negative else "-"

        splits = [self.split == k for k in range(len(SPLITS))]
        lines = [
            ("", *SPLITS),
            ("images", *(f"{s.sum():,}" for s in splits)),
            ("studies", *(count(self.study[s]) for s in splits)),
            ("patients", *(count(self.subject[s]) for s in splits)),
            ("positive labels", "", "", ""),
            *(
                (f"  {name}", *(share(self.targets[s, k]) for s in splits))
                for k, name in enumerate(self.label_names)
            ),
        ]  # fmt: skip
        widths = [max(len(line[k]) for line in lines) for k in range(4)]
        texts = [
            (line[0].ljust(widths[0]) + "".join(f"   {cell:>{w}}" for cell, w in zip(line[1:], widths[1:]))).rstrip()
            for line in lines
        ]
        left_out = "; ".join(f"{n:,} {reason}" for reason, n in self.left_out.items() if n)
        return "\n".join([*texts, "from " + ", ".join(self.sources), f"left out: {left_out or 'nothing'}"])


def split_index(split):
    """Index of a split by name; `val` and `valid` mean the official `validate`."""
    name = SPLIT_ALIASES.get(split, split)
    if name not in SPLITS:
        raise UserError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    return SPLITS.index(name)


# ------------------------------------------------------------------------------------- columns of a CSV file
def read_csv(path, required):
    """The file as a table with at least the columns `required` and one row."""
    try:
        # As text: an image may be called 007.
        text = {"dicom_id": str, "path": str, "split": str}
        frame = pd.read_csv(path, encoding="utf-8-sig", low_memory=False, dtype=text)
    except (OSError, ValueError, EOFError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: cannot be read as CSV ({error})") from error
    frame.columns = [str(c).strip() for c in frame.columns]
    need_columns(frame, required, path)
    if frame.empty:
        raise UserError(f"{path}: the file has no rows")
    return frame


def has_column(path, name):
    """Whether a CSV that was read before has the column."""
    return name in [str(c).strip() for c in pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns]


def need_columns(frame, required, path):
    missing = [c for c in required if c not in frame.columns]
    if missing:
        raise UserError(f"{path}: column {missing[0]!r} is missing (the file has: {', '.join(frame.columns)})")


def first_row(bad):
    """Position of the first bad row."""
    return int(np.flatnonzero(bad)[0])


def names(frame, column, path):
    """A column of names as they are written, none of them empty or given twice."""
    values = frame[column]
    if values.isna().any():
        raise UserError(f"{path}: {column} is empty in data row {first_row(values.isna()) + 1}")
    no_duplicates(values, "image", path)
    return values


def no_duplicates(values, what, path):
    repeated = values[values.duplicated()]
    if len(repeated):
        raise UserError(f"{path}: {what} {repeated.iloc[0]} has more than one row ({len(repeated)} rows too many)")


def integers(frame, column, path):
    """A column of integer ids."""
    values = pd.to_numeric(frame[column], errors="coerce")
    bad = values.isna() | (values % 1 != 0)
    if bad.any():
        row = first_row(bad)
        raise UserError(
            f"{path}: {column} is {frame[column].iloc[row]!r} in data row {row + 1}; expected an integer id"
        )
    return values.astype(np.int64)


def label_values(frame, label_names, path):
    """[N, L] float32 of 1, 0, -1, NaN; anything else is an error that names the place."""
    need_columns(frame, label_names, path)
    values = np.empty((len(frame), len(label_names)), np.float32)
    for k, name in enumerate(label_names):
        column = pd.to_numeric(frame[name], errors="coerce")
        bad = ~(column.isin([1, 0, -1]) | frame[name].isna())
        if bad.any():
            row = first_row(bad)
            raise UserError(
                f"{path}: label {name!r} is {str(frame[name].iloc[row])!r} in data row {row + 1}; "
                "expected 1, 0, -1 (uncertain) or nothing"
            )
        values[:, k] = column
    return values


def split_names(frame):
    """The column `split` with its aliases replaced; other names stay as they are."""
    return frame["split"].astype(str).str.strip().replace(SPLIT_ALIASES)


def split_indices(frame, path):
    """The column `split` as indices into SPLITS."""
    found = split_names(frame)
    bad = ~found.isin(SPLITS)
    if bad.any():
        row = first_row(bad)
        raise UserError(f"{path}: split is {frame['split'].iloc[row]!r} in data row {row + 1}; use {', '.join(SPLITS)}")
    return found.map(SPLITS.index).to_numpy(np.int8)


def to_bytes(strings):
    return np.array([s.encode() for s in strings], dtype=np.bytes_)


# ------------------------------------------------------------------------------------------ the user's own CSV
def find_own_tables(folder):
    """The CSV files with a `path` column in a folder."""
    found = []
    for path in sorted([*folder.glob("*.csv"), *folder.glob("*.csv.gz")]):
        if path.name.startswith("cxr-record-list"):  # of the DICOM release: paths without splits and labels
            continue
        try:
            columns = pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns
        except (OSError, ValueError, EOFError):
            continue  # not a CSV after all: the caller says what was looked for
        if "path" in [str(c).strip() for c in columns]:
            found.append(path)
    return found


def own_table(root, csv, label_names):
    """A CSV of the user's own: `path` (relative to root, or absolute), `split`, the labels, and if possible
    `subject_id`, `study_id` and `dicom_id`."""
    frame = read_csv(csv, ("path", "split"))
    labels = label_values(frame, label_names, csv)
    path = names(frame, "path", csv)
    unknown = np.full(len(frame), -1, np.int64)
    return Table(
        root=root,
        sources=(csv.name,),
        label_names=tuple(label_names),
        path=to_bytes(path),
        dicom_id=to_bytes((frame["dicom_id"] if "dicom_id" in frame else path).astype(str)),
        study=integers(frame, "study_id", csv).to_numpy() if "study_id" in frame else unknown,
        subject=integers(frame, "subject_id", csv).to_numpy() if "subject_id" in frame else unknown,
        split=split_indices(frame, csv),
        labels=labels,
    )


# ---------------------------------------------------------------------------------------- checks of every table
def with_views(table, csv, key):
    """The table with the view of each image, by the column ViewPosition of `csv`.

    key: the column of `csv`, path or dicom_id, that names the image.
    """
    frame = read_csv(csv, (key, "ViewPosition")).drop_duplicates(key)
    found = pd.Series(find_views(frame), index=to_bytes(frame[key].astype(str)))
    return dataclasses.replace(table, view=found.reindex(getattr(table, key)).fillna("").to_numpy().astype(str))


def select_views(table, views, csv):
    """The images of the views asked for, a key of :data:`dataset.views.VIEWS`; csv: where the views are from."""
    keep = np.isin(table.view, VIEWS[views])
    table, here = table.select(keep), table.view
    table.left_out[f"image of another view (DATA.VIEWS {views})"] = int((~keep & (here != "")).sum())
    table.left_out["image of unknown view"] = int((here == "").sum())
    if len(table) == 0:
        raise UserError(f"DATA.VIEWS {views}: {csv} names no image of it")
    return table


def check_paths(table):
    """No path leads out of the data folder by `..`; absolute ones are the user's own choice."""
    suspects = table.path[np.char.find(table.path, b"..") >= 0]
    outside = [path for path in suspects if b".." in path.split(b"/")]
    if outside:
        raise UserError(f"{table.sources[0]}: the path {outside[0].decode()!r} leads out of the data folder by ..")


def check_patients(table):
    """No patient in two splits: the score on the test split would measure memory."""
    known = table.subject >= 0
    pairs = np.unique(np.stack([table.subject[known], table.split[known]], 1), axis=0)
    patients, counts = np.unique(pairs[:, 0], return_counts=True)
    shared = patients[counts > 1]
    if len(shared):
        where = ", ".join(SPLITS[s] for s in pairs[pairs[:, 0] == shared[0], 1])
        raise UserError(
            f"{len(shared)} patient(s) are in more than one split, such as subject_id {shared[0]} in {where}; "
            "put all images of a patient into one split"
        )


def check_files(table, allow_missing=False):
    """The table of the images that are there. With allow_missing each is looked for, and those missing are left out.

    Otherwise an even sample is, and one missing is an error: to touch all 377,110 files takes minutes on a
    parallel file system.
    """
    rows = np.arange(len(table))
    if not allow_missing:
        rows = np.unique(np.linspace(0, len(table) - 1, min(len(table), CHECKED_FILES)).astype(int))
    missing = np.array([not (table.root / table.path[r].decode()).is_file() for r in rows])
    if allow_missing:
        table = table.select(~missing)
        table.left_out["image file missing (DATA.ALLOW_MISSING)"] = int(missing.sum())
        if len(table) == 0:
            raise UserError(f"{table.root}: none of the images of the table is there")
    elif missing.any():
        first = table.root / table.path[rows[missing][0]].decode()
        raise UserError(
            f"image missing: {first} ({int(missing.sum())} of {len(rows)} checked files). Complete the download, "
            "or set DATA.ALLOW_MISSING True to leave out the images that are not there"
        )
    return table


def check_table(table, *, allow_missing=False, in_zip=False):
    """The table once every check above has passed; files in zip shards are the store's to look for."""
    check_paths(table)
    check_patients(table)
    return table if in_zip else check_files(table, allow_missing)
