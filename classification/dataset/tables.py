"""MIMIC-CXR's CSV files, or one of the user's own, as one table of images. Runs without torch.

The formats are those of MIMIC-CXR-JPG 2.1.0 (physionet.org): `-split` has one row an image,
`-chexpert` one row a study with 1.0, 0.0, -1.0 or nothing per label. Columns are read by name:
their order differs between releases.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from dataset.labels import LABELS
from dataset.views import VIEWS, find_views
from errors import UserError

SPLITS = ("train", "validate", "test")
SPLIT_ALIASES = {"val": "validate", "valid": "validate", "validation": "validate"}
SUFFIXES = (".jpg", ".dcm", ".png")
CHECKED_FILES = 500
RADIOLOGIST = "test-set-labeled"  # mimic-cxr-2.1.0-test-set-labeled.csv: read from the reports by a radiologist


@dataclass
class Table:
    """One row an image. Arrays, not Python objects: forked workers then share their memory.

    path: bytes, relative to `root`; split: index into SPLITS; labels: [N, L] float32 of
    1, 0, -1 (uncertain), NaN (not mentioned); subject and study: -1 where the file has none.
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
    left_out: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.path)

    def select(self, keep):
        rows = {name: getattr(self, name)[keep] for name in ("path", "dicom_id", "study", "subject", "split", "labels")}
        return Table(self.root, self.sources, self.label_names, left_out=dict(self.left_out), **rows)


def split_index(split):
    """Index of a split by name; `val` and `valid` mean the official `validate`."""
    name = SPLIT_ALIASES.get(split, split)
    if name not in SPLITS:
        raise UserError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    return SPLITS.index(name)


def read_csv(path, required):
    try:
        # Names stay text: an id of digits alone is none to calculate with, and keeps its zeros.
        text = {"dicom_id": str, "path": str, "split": str}
        frame = pd.read_csv(path, encoding="utf-8-sig", low_memory=False, dtype=text)
    except (OSError, ValueError, EOFError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: cannot be read as CSV ({error})") from error
    frame.columns = [str(c).strip() for c in frame.columns]
    _need_columns(frame, required, path)
    if frame.empty:
        raise UserError(f"{path}: the file has no rows")
    return frame


def _need_columns(frame, required, path):
    missing = [c for c in required if c not in frame.columns]
    if missing:
        raise UserError(f"{path}: column {missing[0]!r} is missing (the file has: {', '.join(frame.columns)})")


def _no_blanks(frame, column, path):
    blank = frame[column].isna()
    if blank.any():
        raise UserError(f"{path}: {column} is empty in data row {_first(blank) + 1}")


def _first(bad):
    """Position of the first bad row."""
    return int(np.flatnonzero(bad)[0])


def _integers(frame, column, path):
    values = pd.to_numeric(frame[column], errors="coerce")
    bad = values.isna() | (values % 1 != 0)
    if bad.any():
        row = _first(bad)
        raise UserError(
            f"{path}: {column} is {frame[column].iloc[row]!r} in data row {row + 1}; expected an integer id"
        )
    return values.astype(np.int64)


def _label_values(frame, label_names, path):
    """[N, L] float32 of 1, 0, -1, NaN; anything else is an error that names the place."""
    values = np.empty((len(frame), len(label_names)), np.float32)
    for k, name in enumerate(label_names):
        column = pd.to_numeric(frame[name], errors="coerce")
        bad = ~(column.isin([1, 0, -1]) | frame[name].isna())
        if bad.any():
            row = _first(bad)
            raise UserError(
                f"{path}: label {name!r} is {str(frame[name].iloc[row])!r} in data row {row + 1}; "
                "expected 1, 0, -1 (uncertain) or nothing"
            )
        values[:, k] = column
    return values


def split_names(frame):
    """The column `split` with its aliases replaced; other names stay as they are."""
    return frame["split"].astype(str).str.strip().replace(SPLIT_ALIASES)


def image_stems(images):
    """Paths of the official layout without their suffixes, from the columns of the split file."""
    subject, study = images["subject_id"].astype(str), images["study_id"].astype(str)
    return "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + images["dicom_id"]


def _splits(frame, path):
    names = split_names(frame)
    bad = ~names.isin(SPLITS)
    if bad.any():
        row = _first(bad)
        raise UserError(f"{path}: split is {frame['split'].iloc[row]!r} in data row {row + 1}; use {', '.join(SPLITS)}")
    return names.map(SPLITS.index).to_numpy(np.int8)


def _duplicates(values, what, path):
    repeated = values[values.duplicated()]
    if len(repeated):
        raise UserError(f"{path}: {what} {repeated.iloc[0]} has more than one row ({len(repeated)} rows too many)")


def _bytes(strings):
    return np.array([s.encode() for s in strings], dtype=np.bytes_)


def find_folders(root):
    """(folder holding `files/`, folders in which the CSVs may lie); root is a release or its `files/`."""
    if not root.is_dir():
        raise UserError(f"data path {root} is not a folder; give the release folder with --data-path")
    base = root.parent if root.name == "files" else root
    return base, list(dict.fromkeys((root, base, base / "files", base.parent)))


def find_csv(folders, kind):
    for folder in folders:
        for pattern in (f"mimic-cxr-*-{kind}.csv", f"mimic-cxr-*-{kind}.csv.gz"):
            for path in sorted(folder.glob(pattern)):
                return path
    return None


def _own_csv(folders):
    """The CSV files with a `path` column in the data folder: a tree of the user's own."""
    found = []
    for path in sorted([*folders[0].glob("*.csv"), *folders[0].glob("*.csv.gz")]):
        if path.name.startswith("cxr-record-list"):  # of the DICOM release: paths without splits and labels
            continue
        try:
            columns = pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns
        except (OSError, ValueError, EOFError):
            continue  # not a CSV after all: the caller says what was looked for
        if "path" in [str(c).strip() for c in columns]:
            found.append(path)
    return found


def _find_suffix(paths, base):
    """The suffix of the tree's images: the release holds either JPG or DICOM."""
    probes = paths[np.linspace(0, len(paths) - 1, min(len(paths), 20)).astype(int)]
    hits = [s for s in SUFFIXES if any((base / (p + s)).is_file() for p in probes)]
    if not hits:
        raise UserError(
            f"no image found: looked for {base / probes[0]} with {', '.join(SUFFIXES)} (and {len(probes) - 1} others); "
            "--data-path must be the folder that holds files/"
        )
    if len(hits) > 1:
        raise UserError(
            f"{base / 'files'} holds both {' and '.join(hits)} images; "
            f"say which to read: DATA.IMAGE_FORMAT {' or '.join(s[1:] for s in hits)}"
        )
    return hits[0]


def _needed_csv(folders, kind):
    path = find_csv(folders, kind)
    if path is None:
        raise UserError(
            f"no mimic-cxr-*-{kind}.csv or .csv.gz in {', '.join(map(str, folders))}; download it from PhysioNet "
            "into the data folder, or name a CSV of your own with DATA.CSV"
        )
    return path


def _read_labels(path, label_names):
    """(study ids, [N, L] values as in the file), one row a study."""
    studies = read_csv(path, ("study_id",))
    if "Lung Opacity" not in studies:  # the radiologist's file has an older name for it
        studies = studies.rename(columns={"Airspace Opacity": "Lung Opacity"})
    _need_columns(studies, label_names, path)
    ids = _integers(studies, "study_id", path)
    _duplicates(ids, "study", path)
    return pd.Index(ids), _label_values(studies, label_names, path)


def _official_table(base, folders, labeler, test_labeler, label_names, image_format):
    files = {kind: _needed_csv(folders, kind) for kind in ("split", labeler)}
    images = read_csv(files["split"], ("dicom_id", "study_id", "subject_id", "split"))
    images["subject_id"] = _integers(images, "subject_id", files["split"])
    images["study_id"] = _integers(images, "study_id", files["split"])
    _no_blanks(images, "dicom_id", files["split"])
    _duplicates(images["dicom_id"], "image", files["split"])
    split = _splits(images, files["split"])

    studies, values = _read_labels(files[labeler], label_names)
    row = studies.get_indexer(images["study_id"])
    labelled, labels = row >= 0, values[row]
    left_out = {"study without a label row": int((~labelled).sum())}
    if test_labeler == "radiologist":
        files["test"] = _needed_csv(folders, RADIOLOGIST)
        studies, values = _read_labels(files["test"], label_names)
        test = split == SPLITS.index("test")
        row = studies.get_indexer(images["study_id"])
        labels[test] = values[row[test]]
        labelled[test] = row[test] >= 0
        left_out = {
            "study without a label row": int((~labelled & ~test).sum()),
            "test study that the radiologist has not labelled": int((~labelled & test).sum()),
        }
    images, split, labels = images[labelled], split[labelled], labels[labelled]
    if images.empty:
        raise UserError(f"{files[labeler]}: none of the studies of {files['split']} has a row here")
    stem = image_stems(images).to_numpy(dtype=object)
    suffix = _find_suffix(stem, base) if image_format == "auto" else "." + image_format
    return Table(
        root=base,
        sources=tuple(path.name for path in files.values()),
        label_names=tuple(label_names),
        path=_bytes(s + suffix for s in stem),
        dicom_id=_bytes(images["dicom_id"]),
        study=images["study_id"].to_numpy(),
        subject=images["subject_id"].to_numpy(),
        split=split,
        labels=labels,
        left_out=left_out,
    )


def _own_table(base, csv, label_names):
    frame = read_csv(csv, ("path", "split", *label_names))
    _no_blanks(frame, "path", csv)
    _duplicates(frame["path"], "image", csv)
    outside = frame["path"].str.contains(r"(?:^|/)\.\.(?:/|$)")
    if outside.any():
        raise UserError(f"{csv}: the path {frame['path'][outside].iloc[0]!r} leads out of the data folder by ..")
    unknown = np.full(len(frame), -1, np.int64)
    name = frame["dicom_id"] if "dicom_id" in frame else frame["path"]
    return Table(
        root=base,
        sources=(csv.name,),
        label_names=tuple(label_names),
        path=_bytes(frame["path"]),
        dicom_id=_bytes(name.astype(str)),
        study=_integers(frame, "study_id", csv).to_numpy() if "study_id" in frame else unknown,
        subject=_integers(frame, "subject_id", csv).to_numpy() if "subject_id" in frame else unknown,
        split=_splits(frame, csv),
        labels=_label_values(frame, label_names, csv),
    )


def _select_views(table, folders, csv, views):
    """The images of the views asked for, by the metadata file or the columns of the user's own table."""
    path = csv or _needed_csv(folders, "metadata")
    key = "path" if csv else "dicom_id"
    frame = read_csv(path, (key, "ViewPosition")).drop_duplicates(key)
    found = pd.Series(find_views(frame), index=_bytes(frame[key].astype(str)))
    here = found.reindex(table.path if csv else table.dicom_id).fillna("").to_numpy()
    keep = np.isin(here, VIEWS[views])
    table = table.select(keep)
    table.left_out[f"image of another view (DATA.VIEWS {views})"] = int((~keep & (here != "")).sum())
    table.left_out["image of unknown view"] = int((here == "").sum())
    if len(table) == 0:
        raise UserError(f"DATA.VIEWS {views}: {path} names no image of it")
    return table


def _check_patients(table):
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


def _check_files(table, allow_missing):
    """Missing images are found before training: all with allow_missing, else an even sample.

    Touching all 377,110 files takes minutes on a parallel file system, hence the sample.
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


@functools.lru_cache(maxsize=2)  # the splits of one run share one table
def load_table(
    root,
    *,
    csv="",
    labeler="chexpert",
    test_labeler="same",
    views="all",
    label_names=LABELS,
    image_format="auto",
    allow_missing=False,
    in_zip=False,
):
    """The table of all images under `root`.

    Args:
        root: the release folder, or its `files/`. The CSVs lie there, beside or above `files/`.
        csv: instead of the official files, one of the user's own with the columns `path`
            (relative to root, or absolute), `split`, the labels, and if possible `subject_id`.
        labeler: chexpert or negbio.
        test_labeler: same, or radiologist: the labels of the test split from `mimic-cxr-*-test-set-labeled.csv`.
        views: all, or a key of :data:`dataset.views.VIEWS`.
        label_names: columns to read.
        image_format: auto, jpg, dcm or png (official layout only).
        allow_missing: leave out images that are not there instead of an error.
        in_zip: images lie in zip files (see `dataset.stores.ZipStore`), not in `files/`.

    Raises:
        UserError: names the file, column or value.
    """
    root = Path(root).expanduser().absolute()
    base, folders = find_folders(root)
    own = [Path(csv) if Path(csv).is_absolute() else base / csv] if csv else []
    if own and not own[0].is_file():
        raise UserError(f"DATA.CSV: {own[0]} does not exist")
    if not own and find_csv(folders, "split") is None:
        own = _own_csv(folders)
        if len(own) > 1:
            names = ", ".join(p.name for p in own)
            raise UserError(f"{root} holds several tables with a path column ({names}); choose one with DATA.CSV")
    if own:
        if test_labeler != "same":
            raise UserError(f"DATA.TEST_LABELER {test_labeler} belongs to the official tables, not to {own[0]}")
        table = _own_table(base, own[0], label_names)
    else:
        if in_zip and image_format == "auto":
            image_format = "jpg"  # the zip shards hold the small JPG copy
        table = _official_table(base, folders, labeler, test_labeler, label_names, image_format)
    if views != "all":
        table = _select_views(table, folders, own[0] if own else None, views)
    _check_patients(table)
    return table if in_zip else _check_files(table, allow_missing)


def summary(table, targets):
    """The table in a few lines: images, studies, patients and positives by split, and what was left out.

    targets: [N, L] of 1, 0 and NaN, after the label policy.
    """

    def count(ids):
        return f"{len(np.unique(ids)):,}" if (ids >= 0).all() else "unknown"

    rows = [("", *SPLITS)]
    splits = [table.split == k for k in range(len(SPLITS))]
    rows.append(("images", *(f"{int(s.sum()):,}" for s in splits)))
    rows.append(("studies", *(count(table.study[s]) for s in splits)))
    rows.append(("patients", *(count(table.subject[s]) for s in splits)))
    for k, name in enumerate(table.label_names):
        cells = []
        for s in splits:
            positive, known = int((targets[s, k] == 1).sum()), int((~np.isnan(targets[s, k])).sum())
            cells.append(f"{positive:,} ({positive / known:.1%})" if known else "-")
        rows.append((f"  {name}", *cells))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = [
        row[0].ljust(widths[0]) + "".join(cell.rjust(w + 3) for cell, w in zip(row[1:], widths[1:])) for row in rows
    ]
    lines.insert(4, "positive labels")
    left_out = [f"{n:,} {reason}" for reason, n in table.left_out.items() if n]
    train = targets[splits[0]]
    for name, target in zip(table.label_names, train.T if len(train) else ()):
        positive, negative = int((target == 1).sum()), int((target == 0).sum())
        if not (positive and negative):
            lines.append(
                f"warning: {name} cannot be learnt, the train split has {positive:,} positives and {negative:,} "
                "negatives of it; see DATA.UNCERTAIN and DATA.MISSING"
            )
    lines.append("from " + ", ".join(table.sources))
    lines.append("left out: " + ("; ".join(left_out) if left_out else "nothing"))
    return "\n".join(lines)
