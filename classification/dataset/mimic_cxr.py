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
from dataset.files.images import ENDINGS, SUFFIXES
from dataset.files.stores import ZipStore
from dataset.labels import LABELS
from dataset.tables import SPLITS, Table
from dataset.xrays import RadiographDataset, build_radiographs

# What this release is known by, see `releases.Release`.
SIGNS = {f"mimic-cxr-*-{kind}.csv": ("study_id", "subject_id") for kind in ("split", "chexpert", "negbio")}
# Labels that CXR-LT adds, by which its tables are known.
CXR_LT = {"Subcutaneous Emphysema", "Tortuous Aorta", "Pneumomediastinum"}
RADIOLOGIST = "test-set-labeled"  # mimic-cxr-2.1.0-test-set-labeled.csv: read from the reports by a radiologist


def find_folders(root):
    """(folder holding `files/`, folders in which the CSVs may lie); root is a release or its `files/`."""
    root = releases.data_folder(root)
    base = root.parent if root.name == "files" else root
    return base, list(dict.fromkeys((root, base, base / "files", base.parent)))


def find_csv(folders, kind):
    """Path of the official table of a kind (split, chexpert, ...), or None; the first of `folders` that has one."""
    tables_there = (releases.Folder(folder).table(f"mimic-cxr-*-{kind}.csv") for folder in folders)
    return next(filter(None, tables_there), None)


def needed_csv(folders, kind):
    """Path of the official table of a kind; a UserError where it is not there."""
    path, base = find_csv(folders, kind), folders[0]
    if path is None:
        raise UserError(
            f"no mimic-cxr-*-{kind}.csv or .csv.gz in {', '.join(map(str, folders))}; download it from PhysioNet "
            f"into the data folder, or name a CSV of your own with DATA.CSV{releases.use_instead(base, 'mimic_cxr')}"
        )
    return path


def image_stems(images):
    """Paths of the official layout without their suffixes, from the columns of the split file."""
    subject, study = images["subject_id"].astype(str), images["study_id"].astype(str)
    return "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + images["dicom_id"]


def _find_suffix(stems, base, suffixes, allow_missing):
    """That of `suffixes` which the tree's images have: the release holds either JPG or DICOM.

    An even sample is looked for; where images may be missing and none of these is there, all are.
    """
    probes = stems[np.linspace(0, len(stems) - 1, min(len(stems), 20)).astype(int)]

    def there(stems, suffixes):
        return [s for s in suffixes if any(os.path.isfile(base / (stem + s)) for stem in stems)]

    hits = there(probes, suffixes) or (there(stems, suffixes) if allow_missing else [])
    if not hits:
        raise UserError(
            f"no image found: looked for {base / probes[0]} with {', '.join(s or 'no suffix' for s in suffixes)} "
            f"(and {len(stems if allow_missing else probes) - 1} others); --data-path must be the folder that holds "
            "files/"
            + ("" if allow_missing else ", and a part of the images needs DATA.ALLOW_MISSING True")
            + releases.other_images(base, False, [s for s in SUFFIXES if s not in suffixes and there(probes, [s])])
        )
    if len(hits) > 1:
        raise UserError(
            f"{base / 'files'} holds both {' and '.join(hits)} images; "
            f"say which to read: DATA.IMAGE_FORMAT {' or '.join(s[1:].lower() for s in hits)}"
        )
    return hits[0]


def _read_images(path):
    """The split file: dicom_id, study_id, subject_id (integers), split (index)."""
    images = tables.read_csv(path, ("dicom_id", "study_id", "subject_id", "split"))
    for column in ("subject_id", "study_id"):
        images[column] = tables.integer_ids(images, column, path)
    images["dicom_id"] = tables.names(images, "dicom_id", path)
    tables.no_duplicates(images["dicom_id"], "image", path)
    return images.assign(split=tables.split_indices(images, path))


def _read_labels(path, label_names, studies, no_finding_clears):
    """(labels [N, L], whether there is a row) of the N `studies`, from a file with one row a study."""
    frame = tables.read_csv(path, ("study_id",))
    if "Lung Opacity" not in frame:  # the radiologist's file has an older name for it
        frame = frame.rename(columns={"Airspace Opacity": "Lung Opacity"})
    values = tables.label_values(frame, label_names, path, no_finding_clears)
    ids = tables.integer_ids(frame, "study_id", path)
    tables.no_duplicates(ids, "study", path)
    row = pd.Index(ids).get_indexer(studies)
    return values[row], row >= 0


def official_table(
    base, folders, *, labeler, test_labeler, label_names, no_finding_clears, image_format, allow_missing, in_zip
):
    """The table of the official files; arguments as :func:`load_table`'s."""
    files = {"split": needed_csv(folders, "split")}
    images = _read_images(files["split"])
    labels, reasons = np.empty((len(images), 0), np.float32), np.full(len(images), "", object)
    if labeler:
        files["labels"] = needed_csv(folders, labeler)
        labels, read = _read_labels(files["labels"], label_names, images["study_id"], no_finding_clears)
        reasons[~read] = "study without a label row"
    if test_labeler == "radiologist":
        files["test"] = needed_csv(folders, RADIOLOGIST)
        test = images["split"].to_numpy() == SPLITS.index("test")
        studies = images["study_id"][test]
        labels[test], read = _read_labels(files["test"], label_names, studies, no_finding_clears)
        reasons[test] = np.where(read, "", "test study that the radiologist has not labelled")
    kept = reasons == ""
    if not kept.any():
        raise UserError(f"{files['labels']}: none of the studies of {files['split']} has a row here")
    images = images[kept]
    stems = image_stems(images).to_numpy(dtype=object)
    if in_zip:  # the shards hold the small JPG copy
        suffix = ".jpg" if image_format == "auto" else "." + image_format
    elif image_format == "auto":
        suffix = _find_suffix(stems, base, SUFFIXES, allow_missing)
    else:
        endings = ENDINGS[image_format]
        suffix = _find_suffix(stems, base, [s for s in SUFFIXES if s.lower() in endings], allow_missing)
    return Table(
        root=base,
        sources=tuple(files.values()),
        label_names=tuple(label_names),
        path=tables.to_bytes(stem + suffix for stem in stems),
        dicom_id=tables.to_bytes(images["dicom_id"]),
        study=tables.to_bytes(images["study_id"].astype(str)),
        subject=tables.to_bytes(images["subject_id"].astype(str)),
        split=images["split"].to_numpy(),
        labels=labels[kept],
        store=ZipStore(base) if in_zip else None,
        left_out=dict(pd.Series(reasons[~kept]).value_counts()),
    )


def _refuse_cxr_lt(path):
    """Raises a UserError where a table is one of CXR-LT: MIMIC-CXR's images, more labels, other splits."""
    columns = tables.read_csv(path, (), rows=False).columns
    if CXR_LT <= set(columns) or re.search("cxr-?_?lt", path.name.lower()):
        row = tables.read_csv(path, ()).iloc[0]
        if row.str.fullmatch(r"1\d{7}|.*/p1\d{7}/s5\d{7}/.*").any():  # a subject_id or a path of MIMIC-CXR
            raise UserError(
                f"{path} is a table of CXR-LT, whose splits are not MIMIC-CXR's: most of its test patients are in "
                "MIMIC-CXR's train split, so that a model of MIMIC-CXR would be tested on what it has seen. Use the "
                "official mimic-cxr-* tables, or a split of your own with patients in one split each"
            )


def find_own_csv(root, csv=""):
    """Path of the user's own table: the one named, or in a folder without official files the only one; else None."""
    base, folders = find_folders(root)
    if csv:
        path = base / Path(csv).expanduser()
        if not os.path.isfile(path):
            fault = "is a folder; name the table in it" if os.path.isdir(path) else "does not exist"
            raise UserError(f"DATA.CSV: {path} {fault}")
        _refuse_cxr_lt(path)
        return path
    if find_csv(folders, "split") is not None:
        return None
    there, found = tables.find_own_tables(folders[0])
    for path, text in there.items():
        if text.startswith(f"{path.name} has "):  # else it cannot be read
            _refuse_cxr_lt(path)
    if len(found) > 1:
        several = ", ".join(path.name for path in found)
        raise UserError(f"{folders[0]} holds several tables with a path column ({several}); choose one with DATA.CSV")
    if not found and there:
        raise UserError(
            f"no mimic-cxr-*-split.csv or .csv.gz in {', '.join(map(str, folders))}, and no other table there has "
            f"the columns path and split ({'; '.join(there.values())}){releases.use_instead(folders[0], 'mimic_cxr')}"
        )
    return found[0] if found else None


def load_table(
    root,
    *,
    csv="",
    labeler="chexpert",
    test_labeler="same",
    views="all",
    label_names=None,
    no_finding_clears=False,
    image_format="auto",
    allow_missing=False,
    in_zip=False,
):
    """The table of all images under `root`, checked.

    Args:
        root: the release folder, or its `files/`. The CSVs lie there, beside or above `files/`.
        csv: instead of the official files, one of the user's own, see :func:`dataset.tables.own_table`.
        labeler: chexpert or negbio; empty: no labels.
        test_labeler: same, or radiologist: the labels of the test split from `mimic-cxr-*-test-set-labeled.csv`.
        views: all, or a key of :data:`dataset.views.VIEWS`.
        label_names: columns to read; None: the 14 of CheXpert, or what a table of the user's own has instead.
        no_finding_clears: where No Finding is 1, a blank label is 0, but for Support Devices.
        image_format: auto, jpg, dcm or png (official layout only).
        allow_missing: leave out images that are not there instead of an error.
        in_zip: images lie in zip files (see `dataset.files.stores.ZipStore`), not in `files/`.

    Raises:
        UserError: names the file, column or value.
    """
    base, folders = find_folders(root)
    own = find_own_csv(root, csv)
    if own is None:
        table = official_table(
            base,
            folders,
            labeler=labeler,
            test_labeler=test_labeler,
            label_names=LABELS if label_names is None else label_names,
            no_finding_clears=no_finding_clears,
            image_format=image_format,
            allow_missing=allow_missing,
            in_zip=in_zip,
        )
    elif test_labeler != "same":
        raise UserError(f"DATA.TEST_LABELER {test_labeler} belongs to the official tables, not to {own}")
    else:
        table = tables.own_table(base, own, label_names if labeler else (), no_finding_clears)
        table.store = ZipStore(base) if in_zip else table.store
    metadata = own or (needed_csv(folders, "metadata") if views != "all" else find_csv(folders, "metadata"))
    if views != "all" or (metadata and "ViewPosition" in tables.read_csv(metadata, (), rows=False)):
        table = tables.with_views(table, metadata, "path" if own else "dicom_id")
    if views != "all":
        table = tables.select_views(table, views, metadata)
    return tables.check_table(table, allow_missing)


def whole_table(root, *, csv="", image_format="auto", allow_missing=False):
    """The table of all images, without labels: for those who copy them."""
    return load_table(root, csv=csv, labeler="", image_format=image_format, allow_missing=allow_missing)


def learned_labels(root, csv=""):
    """The labels that training learns where DATA.LABELS names none."""
    own = find_own_csv(root, csv)
    return tables.own_table(own.parent, own).label_names if own else LABELS


def tables_to_copy(root, _table, csv=""):
    """{path in a copy: table} of the official files; of a table of the user's own, its frame."""
    if own := find_own_csv(root, csv):
        return {"images.csv": tables.read_csv(own, ("path",))}
    found = [path for folder in find_folders(root)[1] for path in sorted(folder.glob("mimic-cxr-*.csv*"))]
    return {path.name: path for path in reversed(found)}  # the first of a name


class MIMICCXRDataset(RadiographDataset):
    """One split of MIMIC-CXR, or of a table of the user's own; item = (image, target).

    Args:
        root: the release folder or its `files/`.
        split, transform: see :class:`dataset.xrays.RadiographDataset`, also for further keywords.
        uncertain, missing: policy for -1 and for blank labels, see :func:`dataset.labels.apply_policy`.
        keywords: also those of :func:`load_table`.
    """

    def __init__(self, root, split, transform=None, *, uncertain="zeros", missing="zeros", **keywords):
        reading = {name: keywords.pop(name) for name in load_table.__kwdefaults__ if name in keywords}
        super().__init__(load_table(root, **reading).with_targets(uncertain, missing), split, transform, **keywords)


def table(config, *_splits):
    """The table that `config` describes."""
    d = config.DATA
    return load_table(
        d.DATA_PATH,
        csv=d.CSV,
        labeler=d.LABELER,
        test_labeler=d.TEST_LABELER,
        views=d.VIEWS,
        label_names=tuple(d.LABELS) or None,
        no_finding_clears=d.NO_FINDING_CLEARS,
        image_format=d.IMAGE_FORMAT,
        allow_missing=d.ALLOW_MISSING,
        in_zip=d.ZIP_MODE,
    )


def build(config, *splits):
    """The datasets of `splits` that `config` describes, over one table."""
    official = find_own_csv(config.DATA.DATA_PATH, config.DATA.CSV) is None
    uses = frozenset({"DATA.IMAGE_FORMAT", "DATA.LABELER", "DATA.TEST_LABELER"} if official else ())
    return build_radiographs(config, table(config, *splits), splits, uses)
