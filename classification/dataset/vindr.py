"""VinDr-CXR (DATA.DATASET vindr): annotations/image_labels_train.csv, three readers an image, and the consensus of
image_labels_test.csv; images in train/ and test/. It has no patient ids and no views.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import UserError
from dataset import tables
from dataset.files.images import SUFFIXES
from dataset.releases import Reading, Release

FINDINGS = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture",
    "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other disease", "No finding",
)  # fmt: skip
ALSO = {"Other diseases": "Other disease"}  # so in some of the tables
SIGNS = {
    "annotations/image_labels_train.csv": ("image_id", "rad_id"),
    "image_labels_train.csv": ("image_id", "rad_id"),
    "annotations/image_labels_test.csv": ("image_id", "Aortic enlargement"),
    "image_labels_test.csv": ("image_id", "Aortic enlargement"),
}


def _need_rows(folder, split, images, path):
    """Raises a UserError where the folder of a split holds an image that the table does not name."""
    known = set(images)
    unknown = [
        name
        for name in folder.files(split)
        if (Path(name).suffix.lower() in SUFFIXES[:-1] or "." not in name) and Path(name).stem not in known
    ]
    if unknown:
        raise UserError(
            f"{path} has no row of {split}/{unknown[0]} ({len(unknown)} such images); complete the table, or take "
            "these images out of the folder"
        )


def _agree(values, row, count, readers):
    """What the readers say of `count` images: 1 where most (or any) of them do, -1 where they are at odds, else 0.

    values: [R] of 1, 0, NaN, one a reader; row: [R] of which image.
    """
    marked = np.bincount(row, values == 1, count)
    said = np.bincount(row, ~np.isnan(values), count)
    if readers == "any":
        found = (marked > 0).astype(np.float32)
    else:
        found = np.where(2 * marked == said, -1, 2 * marked > said).astype(np.float32)
        found[marked == 0] = 0
    found[said == 0] = np.nan
    return found


def read(folder, readers="majority", need_rows=True):
    """The release in a :class:`dataset.releases.Folder` as a :class:`dataset.releases.Reading`.

    readers: majority or any; need_rows: an image without a row is an error.
    """
    images, rows, frames, files = {}, {}, {}, {}
    for split in ("train", "test"):
        name = f"image_labels_{split}.csv"
        path = files[split] = folder.needed(f"annotations/{name}", name, why=f"the labels of the {split} split")
        frame = frames[split] = tables.read_csv(path, ("image_id",)).rename(columns=ALSO)
        names = tables.names(frame, "image_id", path)
        if split == "train":
            tables.need_columns(frame, ("rad_id",), path)
            tables.no_duplicates(names + " of the reader " + tables.names(frame, "rad_id", path), "image", path)
        else:
            tables.no_duplicates(names, "image", path)
        rows[split], images[split] = pd.factorize(names)
        if need_rows:
            _need_rows(folder, split, images[split], path)

    def finding(name):
        name, found = ALSO.get(name, name), []
        for split, frame in frames.items():
            values = tables.label_values(frame, (name,), files[split])[:, 0]
            found.append(_agree(values, rows[split], len(images[split]), readers))
        return np.concatenate(found)

    image = pd.Series([name for split in images for name in images[split]])
    split = np.repeat(list(images), [len(names) for names in images.values()])
    return Reading(
        sources=tuple(files.values()),
        image=image,
        subject=None,
        study=None,
        view=None,
        paths=[pd.Series(split) + "/" + image],
        suffixes=(".dicom", *(s for s in SUFFIXES if s != ".dicom")),
        finding=finding,
        names=(*FINDINGS, *ALSO),
        split=split,
    )


RELEASE = Release("vindr", SIGNS, read, {"readers": "DATA.READERS"}, ("DATA.SPLIT_SEED",),
                  all_images={"need_rows": False})  # fmt: skip
load_table, table, build = RELEASE.load_table, RELEASE.table, RELEASE.build
