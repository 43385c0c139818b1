"""NIH ChestX-ray14 (DATA.DATASET nih): Data_Entry_2017, the two lists of the official split, images/*.png.

Findings are joined by `|`. The lists have no validation split. One image is one study (a follow-up of a patient).
"""

import numpy as np
import pandas as pd

from common.errors import UserError, did_you_mean
from dataset import tables
from dataset.releases import Reading, Release, views

SIGNS = {"Data_Entry_2017*.csv": ("Image Index", "Finding Labels")}
FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
NORMAL = "No Finding"
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}


def _splits(folder, images):
    """(split of each image, "" where no list names it; the paths of the lists)."""
    split, paths = pd.Series("", images), {}
    for name, file in LISTS.items():
        path = paths[name] = folder.needed(file, why=f"the official {name} split")
        here = split.index.isin({line.strip() for line in path.read_text("utf-8-sig", errors="replace").splitlines()})
        if (both := here & (split != "")).any():
            raise UserError(
                f"{path}: {split.index[both][0]} is in {paths['train'].name} too; it belongs in one of them"
            )
        split[here] = name
    return split.to_numpy(str), tuple(paths.values())


def _places(folder, images):
    """The paths of the images in one folder, or in the twelve of the download."""
    yield "images/" + images
    yield images
    where = {}
    for place in (f"images_{k:03d}{below}" for k in range(1, 13) for below in ("/images", "")):
        where |= {name.partition(".")[0]: f"{place}/" for name in folder.files(place)}  # in a copy they are JPEGs
    if where:
        yield images.str.partition(".")[0].map(where).fillna("images_001/images/") + images


def read(folder):
    """The release in a :class:`dataset.releases.Folder` as a :class:`dataset.releases.Reading`."""
    entries = folder.needed("Data_Entry_2017_v2020.csv", "Data_Entry_2017*.csv", why="the table of the images")
    frame = tables.read_csv(entries, ("Image Index", "Finding Labels", "Patient ID", "Follow-up #", "View Position"))
    images = tables.names(frame, "Image Index", entries)
    tables.no_duplicates(images, "image", entries)
    split, lists = _splits(folder, images)
    kept = split != ""
    if not kept.any():
        raise UserError(f"{lists[0]} and {lists[1]} name none of the images of {entries}")
    frame, images = frame[kept], images[kept]
    codes, texts = pd.factorize(tables.names(frame, "Finding Labels", entries))
    sets = [{part.strip() for part in text.split("|")} for text in texts]
    for name in sorted(set().union(*sets) - {*FINDINGS, NORMAL}):
        raise UserError(f"{entries}: the finding {name!r} is none of NIH's{did_you_mean(name, FINDINGS)}")
    subject = tables.names(frame, "Patient ID", entries)
    return Reading(
        sources=(entries, *lists),
        image=images,
        subject=subject,
        study=subject + "_" + frame["Follow-up #"].str.strip(),
        view=views(frame["View Position"]),
        paths=_places(folder, images),
        finding=lambda name: np.array([name in found for found in sets], np.float32)[codes],
        names=(*FINDINGS, NORMAL),
        split=split[kept],
        left_out={"image that neither list of the split names": int((~kept).sum())},
    )


RELEASE = Release("nih", SIGNS, read, uses=("DATA.SPLIT_SEED",))
load_table, table, build = RELEASE.load_table, RELEASE.table, RELEASE.build
