"""MIMIC-CXR (DATA.DATASET mimic_cxr): its official CSV files, or one of the user's own, as a table and as a dataset.

The formats are those of MIMIC-CXR-JPG 2.1.0 (physionet.org): `-split` has one row an image, `-chexpert` one row a
study with 1.0, 0.0, -1.0 or nothing per label. Columns are read by name: their order differs between releases.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from dataset import tables
from dataset.images import SUFFIXES
from dataset.labels import LABELS
from dataset.tables import SPLITS, Table
from dataset.xrays import RadiographDataset, build_radiographs
from errors import UserError

RADIOLOGIST = "test-set-labeled"  # mimic-cxr-2.1.0-test-set-labeled.csv: read from the reports by a radiologist


def find_folders(root):
    """(folder holding `files/`, folders in which the CSVs may lie); root is a release or its `files/`."""
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"data path {root} is not a folder; give the release folder with --data-path")
    base = root.parent if root.name == "files" else root
    return base, list(dict.fromkeys((root, base, base / "files", base.parent)))


def find_csv(folders, kind):
    """Path of the official table of a kind (split, chexpert, ...), or None."""
    for folder in folders:
        for pattern in (f"mimic-cxr-*-{kind}.csv", f"mimic-cxr-*-{kind}.csv.gz"):
            for path in sorted(folder.glob(pattern)):
                return path
    return None


def _needed_csv(folders, kind):
    path = find_csv(folders, kind)
    if path is None:
        raise UserError(
            f"no mimic-cxr-*-{kind}.csv or .csv.gz in {', '.join(map(str, folders))}; download it from PhysioNet "
            "into the data folder, or name a CSV of your own with DATA.CSV"
        )
    return path


def image_stems(images):
    """Paths of the official layout without their suffixes, from the columns of the split file."""
    subject, study = images["subject_id"].astype(str), images["study_id"].astype(str)
    return "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + images["dicom_id"]


def _find_suffix(stems, base):
    """The suffix of the tree's images: the release holds either JPG or DICOM."""
    probes = stems[np.linspace(0, len(stems) - 1, min(len(stems), 20)).astype(int)]
    hits = [s for s in SUFFIXES if any((base / (p + s)).is_file() for p in probes)]
    if not hits:
        raise UserError(
            f"no image found: looked for {base / probes[0]} with {', '.join(SUFFIXES[:-1])} or without a suffix "
            f"(and {len(probes) - 1} others); "
            "--data-path must be the folder that holds files/"
        )
    if len(hits) > 1:
        raise UserError(
            f"{base / 'files'} holds both {' and '.join(hits)} images; "
            f"say which to read: DATA.IMAGE_FORMAT {' or '.join(s[1:] for s in hits)}"
        )
    return hits[0]


def _read_images(path):
    """The split file: dicom_id, study_id, subject_id (integers), split (index)."""
    images = tables.read_csv(path, ("dicom_id", "study_id", "subject_id", "split"))
    for column in ("subject_id", "study_id"):
        images[column] = tables.integers(images, column, path)
    tables.names(images, "dicom_id", path)
    return images.assign(split=tables.split_indices(images, path))


def _read_labels(path, label_names, studies):
    """(labels [N, L], whether there is a row) of the N `studies`, from a file with one row a study."""
    frame = tables.read_csv(path, ("study_id",))
    if "Lung Opacity" not in frame:  # the radiologist's file has an older name for it
        frame = frame.rename(columns={"Airspace Opacity": "Lung Opacity"})
    values = tables.label_values(frame, label_names, path)
    ids = tables.integers(frame, "study_id", path)
    tables.no_duplicates(ids, "study", path)
    row = pd.Index(ids).get_indexer(studies)
    return values[row], row >= 0


def official_table(base, folders, *, labeler, test_labeler, label_names, image_format):
    """The table of the official files; arguments as :func:`load_table`'s."""
    files = {kind: _needed_csv(folders, kind) for kind in ("split", labeler)}
    images = _read_images(files["split"])
    labels, labelled = _read_labels(files[labeler], label_names, images["study_id"])
    reasons = np.where(labelled, "", "study without a label row")
    if test_labeler == "radiologist":
        files["test"] = _needed_csv(folders, RADIOLOGIST)
        test = images["split"].to_numpy() == SPLITS.index("test")
        labels[test], read = _read_labels(files["test"], label_names, images["study_id"][test])
        reasons = reasons.astype(object)
        reasons[test] = np.where(read, "", "test study that the radiologist has not labelled")
    labelled = reasons == ""
    if not labelled.any():
        raise UserError(f"{files[labeler]}: none of the studies of {files['split']} has a row here")
    images = images[labelled]
    stems = image_stems(images).to_numpy(dtype=object)
    suffix = _find_suffix(stems, base) if image_format == "auto" else "." + image_format
    return Table(
        root=base,
        sources=tuple(path.name for path in files.values()),
        label_names=tuple(label_names),
        path=tables.to_bytes(stem + suffix for stem in stems),
        dicom_id=tables.to_bytes(images["dicom_id"]),
        study=images["study_id"].to_numpy(),
        subject=images["subject_id"].to_numpy(),
        split=images["split"].to_numpy(),
        labels=labels[labelled],
        left_out=dict(pd.Series(reasons[~labelled]).value_counts()),
    )


def _find_own_csv(csv, base, folders):
    """Path of the user's own table: the one named, or in a folder without official files the only one; else None."""
    if csv:
        path = base / Path(csv).expanduser()
        if not path.is_file():
            raise UserError(f"DATA.CSV: {path} does not exist")
        return path
    found = tables.find_own_tables(folders[0]) if find_csv(folders, "split") is None else []
    if len(found) > 1:
        several = ", ".join(path.name for path in found)
        raise UserError(f"{folders[0]} holds several tables with a path column ({several}); choose one with DATA.CSV")
    return found[0] if found else None


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
    """The table of all images under `root`, checked.

    Args:
        root: the release folder, or its `files/`. The CSVs lie there, beside or above `files/`.
        csv: instead of the official files, one of the user's own, see :func:`dataset.tables.own_table`.
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
    base, folders = find_folders(root)
    own = _find_own_csv(csv, base, folders)
    if own is None:
        if in_zip and image_format == "auto":
            image_format = "jpg"  # the zip shards hold the small JPG copy
        table = official_table(
            base,
            folders,
            labeler=labeler,
            test_labeler=test_labeler,
            label_names=label_names,
            image_format=image_format,
        )
    elif test_labeler != "same":
        raise UserError(f"DATA.TEST_LABELER {test_labeler} belongs to the official tables, not to {own}")
    else:
        table = tables.own_table(base, own, label_names)
    if own:
        metadata, key = own if views != "all" or tables.has_column(own, "ViewPosition") else None, "path"
    else:
        metadata, key = (
            _needed_csv(folders, "metadata") if views != "all" else find_csv(folders, "metadata"),
            "dicom_id",
        )
    if metadata:
        table = tables.with_views(table, metadata, key)
    if views != "all":
        table = tables.select_views(table, views, metadata)
    return tables.check_table(table, allow_missing=allow_missing, in_zip=in_zip)


class MIMICCXRDataset(RadiographDataset):
    """One split of MIMIC-CXR, or of a table of the user's own; item = (image, target).

    Args:
        root: the release folder or its `files/`.
        split, transform: see :class:`dataset.xrays.RadiographDataset`, also for further keywords.
        uncertain, missing: policy for -1 and for blank labels, see :func:`dataset.labels.apply_policy`.
        table: keywords of :func:`load_table`.
    """

    def __init__(self, root, split, transform=None, *, uncertain="zeros", missing="zeros", in_zip=False, **keywords):
        reading = {name: keywords.pop(name) for name in load_table.__kwdefaults__ if name in keywords}
        table = load_table(root, in_zip=in_zip, **reading).with_targets(uncertain, missing)
        super().__init__(table, split, transform, in_zip=in_zip, **keywords)


def build(config, *splits):
    """The datasets of `splits` that `config` describes, over one table."""
    d = config.DATA
    table = load_table(
        d.DATA_PATH,
        csv=d.CSV,
        labeler=d.LABELER,
        test_labeler=d.TEST_LABELER,
        views=d.VIEWS,
        label_names=tuple(d.LABELS) or LABELS,
        image_format=d.IMAGE_FORMAT,
        allow_missing=d.ALLOW_MISSING,
        in_zip=d.ZIP_MODE,
    )
    return build_radiographs(config, table, splits)
