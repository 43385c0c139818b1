"""MIMIC-CXR (DATA.DATASET mimic_cxr): its official CSV files, or one of the user's own, as a table and as a dataset.

The formats are those of MIMIC-CXR-JPG 2.1.0 (physionet.org): `-split` has one row an image, `-chexpert` one row a
study with 1.0, 0.0, -1.0 or nothing per label. Columns are read by name: their order differs between releases.
"""

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import UserError
from dataset import releases, tables
from dataset.files.images import SUFFIXES, decode
from dataset.labels import LABELS
from dataset.releases import Folder, Reading, Release
from dataset.views import find_views
from dataset.xrays import RadiographDataset

# What this release is known by, see `releases.Release`.
SIGNS = {f"mimic-cxr-*-{kind}.csv": ("study_id", "subject_id") for kind in ("split", "chexpert", "negbio")}
# Labels that CXR-LT adds, by which its tables are known.
CXR_LT = {"Subcutaneous Emphysema", "Tortuous Aorta", "Pneumomediastinum"}
RADIOLOGIST = "test-set-labeled"  # mimic-cxr-2.1.0-test-set-labeled.csv: read from the reports by a radiologist
IDS = ("dicom_id", "study_id", "subject_id")
OWN_COLUMNS = ("path", "split", *IDS, "ViewPosition")  # of a table of the user's own; the others may be labels


# ------------------------------------------------------------------------------------------ the official tables
def find_folder(root, in_zip=False):
    """The :class:`Folder` that holds `files/`; root is it, or its `files/`. The CSVs lie there, in or above it."""
    root = releases.data_folder(root)
    base = root.parent if root.name == "files" else root
    return Folder(base, in_zip, also=(base / "files", base.parent))


def find_csv(folder, kind):
    """Path of the official table of a kind (split, chexpert, ...), or None."""
    return folder.table(f"mimic-cxr-*-{kind}.csv")


def _absent(folder, kind):
    return (
        f"no mimic-cxr-*-{kind}.csv or .csv.gz in {folder.places}; download it from PhysioNet into the data folder, or "
        f"name a CSV of your own with DATA.CSV{releases.use_instead(folder.root, 'mimic_cxr')}"
    )


def needed_csv(folder, kind):
    """Path of the official table of a kind; a UserError where it is not there."""
    path = find_csv(folder, kind)
    if path is None:
        raise UserError(_absent(folder, kind))
    return path


def image_stems(images):
    """Paths of the official layout without their suffixes, from the columns of the split file."""
    subject, study = images["subject_id"].astype(str), images["study_id"].astype(str)
    return "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + images["dicom_id"]


def _read_studies(path, studies):
    """(a label table with one row a study, the row of each of `studies`, -1 where there is none)."""
    frame = tables.read_csv(path, ("study_id",))
    if "Lung Opacity" not in frame:  # the radiologist's file has an older name for it
        frame = frame.rename(columns={"Airspace Opacity": "Lung Opacity"})
    ids = tables.integer_ids(frame, "study_id", path)
    tables.no_duplicates(ids, "study", path)
    return frame, pd.Index(ids).get_indexer(studies)


def _read_views(path, key, images):
    """(views of `images`, named by the column `key` of a table, or None; why there are none)."""
    frame = tables.read_csv(path, (key,))
    if "ViewPosition" not in frame:
        return None, f"{path}: column 'ViewPosition' is missing"
    frame = frame.assign(**{key: frame[key].str.strip()}).drop_duplicates(key)
    return pd.Series(find_views(frame), index=frame[key]).reindex(images).fillna("").to_numpy(str), ""


def _read_official(folder, labeler, test_labeler):
    source = needed_csv(folder, "split")
    images = tables.read_csv(source, (*IDS, "split"))
    for column in ("subject_id", "study_id"):
        images[column] = tables.integer_ids(images, column, source)
    images["dicom_id"] = tables.names(images, "dicom_id", source)
    images["split"] = tables.read_splits(images, source)
    by_radiologist = (images["split"] == "test").to_numpy() & (test_labeler == "radiologist")
    kept, files, left_out = np.ones(len(images), bool), {}, {}
    for kind, rows, reason in (
        (labeler, ~by_radiologist, "study without a label row"),
        (RADIOLOGIST, by_radiologist, "test study that the radiologist has not labelled"),
    ):
        if kind and rows.any():
            path = needed_csv(folder, kind)
            frame, row = _read_studies(path, images["study_id"])
            files[path], absent = (frame, row, rows), rows & (row < 0)
            kept &= ~absent
            left_out |= {reason: int(absent.sum())} if absent.any() else {}
    if not kept.any():
        raise UserError(f"{next(iter(files))}: none of the studies of {source} has a row here")
    images = images[kept]

    def finding(name):
        values = np.empty(len(kept), np.float32)
        for path, (frame, row, rows) in files.items():
            values[rows] = tables.label_values(frame, (name,), path)[row[rows], 0]
        return values[kept]

    metadata, view = find_csv(folder, "metadata"), (None, _absent(folder, "metadata"))
    if metadata:
        view = _read_views(metadata, "dicom_id", images["dicom_id"])
    columns = [name for frame, *_ in files.values() for name in frame if name not in IDS]
    return Reading(
        sources=(source, *files),
        image=images["dicom_id"],
        subject=images["subject_id"].astype(str),
        study=images["study_id"].astype(str),
        view=view[0],
        lacks_view=view[1],
        paths=[image_stems(images)],
        suffixes=SUFFIXES,
        finding=finding,
        names=tuple(dict.fromkeys((*LABELS, *columns))),
        split=images["split"].to_numpy(),
        left_out=left_out,
    )


# ------------------------------------------------------------------------------------------ the user's own table
def _refuse_cxr_lt(path):
    """Raises a UserError where a table is one of CXR-LT: MIMIC-CXR's images, more labels, other splits."""
    columns = tables.read_csv(path, (), rows=False).columns
    if CXR_LT <= set(columns) or re.search("cxr-?_?lt", path.name.lower()):
        row = tables.read_csv(path, ()).iloc[0]
        if row.str.fullmatch(r"1\d{7}|.*/p1\d{7}/s5\d{7}/.*").any():  # a subject_id or a path of MIMIC-CXR
            raise UserError(
                f"{path} is a table of CXR-LT, whose splits are not MIMIC-CXR's: most of its test patients are in "
                "MIMIC-CXR's train split, so that a model of MIMIC-CXR would be tested on what it has seen. Read it by "
                "--dataset cxr_lt, or use the official mimic-cxr-* tables"
            )


def find_own_csv(folder, csv=""):
    """Path of the user's own table: the one named, or in a folder without official files the only one; else None.

    That is a table with the columns `path` and `split`, or where none has both, `path`; what the tools write has no
    `split`.
    """
    if csv:
        path = folder.root / Path(csv).expanduser()
        if not os.path.isfile(path):
            fault = "is a folder; name the table in it" if os.path.isdir(path) else "does not exist"
            raise UserError(f"DATA.CSV: {path} {fault}")
        _refuse_cxr_lt(path)
        return path
    if find_csv(folder, "split") is not None:
        return None
    there, headers = [], {}
    for path in sorted(path for kind in ("csv", "tsv") for path in folder.root.glob(f"*.{kind}*")):
        # cxr-record-list: of the DICOM release, paths without splits and labels
        if path.suffix in (".csv", ".tsv", ".gz") and not path.name.startswith("cxr-record-list"):
            try:
                headers[path] = list(tables.read_csv(path, (), rows=False).columns)
                there.append(f"{path.name} has {', '.join(headers[path])}")
            except UserError as error:
                there.append(str(error))
    for path in headers:
        _refuse_cxr_lt(path)
    named = [path for path, columns in headers.items() if "path" in columns]
    found = [path for path in named if "split" in headers[path]] or named
    if len(found) > 1:
        several = ", ".join(path.name for path in found)
        raise UserError(f"{folder.root} holds several tables with a path column ({several}); choose one with DATA.CSV")
    if not found and there:
        raise UserError(
            f"no mimic-cxr-*-split.csv or .csv.gz in {folder.places}, and no other table there has the columns path "
            f"and split ({'; '.join(there)}){releases.use_instead(folder.root, 'mimic_cxr')}"
        )
    return found[0] if found else None


def _find_labels(frame, path):
    """(the labels of a table, texts for the summary): those of CheXpert, or where they are not all there, the columns
    that hold 1, 0, -1 or nothing, and not nothing alone.

    UserError: another value in a column of the name of a label of CheXpert, or mostly of such values.
    """
    found, others = [], []
    for name in (name for name in frame.columns if name not in OWN_COLUMNS):
        counts = frame[name].value_counts()
        read = {text: tables.read_label(text) for text in counts.index}
        known = counts[[value is not None and not np.isnan(value) for value in read.values()]].sum()
        bad = counts[[value is None for value in read.values()]].sum()
        if name in LABELS or known > bad > 0:
            tables.label_values(frame, (name,), path, "; or name the columns of the labels with DATA.LABELS")
        (found if known and not bad else others).append(name)
    if set(LABELS) <= set(frame.columns) or not found or tuple(found) == LABELS:
        return LABELS, ()
    listed = [", ".join(some[:20]) + (", ..." if len(some) > 20 else "") or "none" for some in (found, others)]
    return tuple(found), (
        f"labels: {listed[0]}: the columns of {path.name} that hold 1, 0 or -1, since DATA.LABELS names none; other "
        f"columns: {listed[1]}",
    )


def _read_own(path):
    """A CSV of the user's own: `path` (relative to the folder, or absolute), `split`, the labels, and if possible
    `subject_id`, `study_id`, `dicom_id` and `ViewPosition`."""
    frame = tables.read_csv(path, ("path", "split"))
    paths, remedy = tables.names(frame, "path", path), "; give every row one, or leave the column out"
    tables.no_duplicates(paths.map(os.path.normpath), "image", path)
    dicom, study, subject = (tables.names(frame, c, path, remedy) if c in frame else None for c in IDS)
    view, lacks_view = _read_views(path, "path", paths)
    return Reading(
        sources=(path,),
        image=paths if dicom is None else dicom,
        subject=subject,
        study=study,
        view=view,
        lacks_view=lacks_view,
        paths=[paths],
        finding=lambda name: tables.label_values(frame, (name,), path)[:, 0],
        names=tuple(dict.fromkeys((*LABELS, *(name for name in frame if name not in OWN_COLUMNS)))),
        split=tables.read_splits(frame, path),
        default_labels=lambda: _find_labels(frame, path),
    )


# ------------------------------------------------------------------------------------------------ the release
def read(folder, csv="", labeler="chexpert", test_labeler="same"):
    """The release in a :class:`dataset.releases.Folder` as a :class:`dataset.releases.Reading`.

    csv: instead of the official files, a table of the user's own.
    labeler: chexpert or negbio; empty: no labels.
    test_labeler: same, or radiologist: the labels of the test split from `mimic-cxr-*-test-set-labeled.csv`.
    """
    own = find_own_csv(folder, csv)
    if own is None:
        return _read_official(folder, labeler, test_labeler)
    if test_labeler != "same":
        raise UserError(f"DATA.TEST_LABELER {test_labeler} belongs to the official tables, not to {own}")
    return _read_own(own)


class MimicRelease(Release):
    """MIMIC-CXR, which may have a table of the user's own."""

    def folder(self, root, in_zip=False, **_options):
        return find_folder(root, in_zip)

    def find_own_csv(self, root, csv=""):
        return find_own_csv(find_folder(root), csv)

    def learned_labels(self, root, csv=""):
        own = self.find_own_csv(root, csv)
        return _find_labels(tables.read_csv(own, ("path", "split")), own)[0] if own else LABELS

    def tables_to_copy(self, root, table, csv=""):
        """Of a table of the user's own, its frame."""
        if own := self.find_own_csv(root, csv):
            return {"images.csv": tables.read_csv(own, ("path",))}
        found = [path for place in find_folder(root).searched for path in sorted(place.glob("mimic-cxr-*.csv*"))]
        return {path.name: path for path in reversed(found)}  # the first of a name

    def uses_of(self, config):
        return frozenset() if self.find_own_csv(config.DATA.DATA_PATH, config.DATA.CSV) else super().uses_of(config)


RELEASE = MimicRelease(
    "mimic_cxr", SIGNS, read,
    {"csv": "DATA.CSV", "labeler": "DATA.LABELER", "test_labeler": "DATA.TEST_LABELER"}, all_images={"labeler": ""},
)  # fmt: skip
load_table, table, build = RELEASE.load_table, RELEASE.table, RELEASE.build


class MIMICCXRDataset(RadiographDataset):
    """One split of MIMIC-CXR, or of a table of the user's own; item = (image, target).

    Args:
        root: the release folder or its `files/`.
        split, transform: see :class:`dataset.xrays.RadiographDataset`, also for further keywords.
        uncertain, missing: policy for -1 and for blank labels, see :func:`dataset.labels.apply_policy`.
        keywords: also those of :meth:`dataset.releases.Release.load_table` and of :func:`read`.
    """

    def __init__(self, root, split, transform=None, *, uncertain="zeros", missing="zeros", **keywords):
        known = {*RadiographDataset.__init__.__kwdefaults__, *decode.__kwdefaults__}
        own = {name: keywords.pop(name) for name in known & keywords.keys()}
        super().__init__(load_table(root, **keywords).with_targets(uncertain, missing), split, transform, **own)
