"""CheXpert (DATA.DATASET chexpert), either size: train.csv, valid.csv and, where it is there, groundtruth.csv.

The full size is unpacked into four folders `CheXpert-v1.0 batch N (...)`, in some of which `train/` is missing.

groundtruth.csv has one row a study of the test set, `CheXpert-v1.0/test/patient64741/study1`; which images a study has
is named by its folder. The labels are those of MIMIC-CXR, by the same labeler.
"""

import itertools

import numpy as np
import pandas as pd

from common.errors import UserError
from dataset import tables
from dataset.labels import LABELS
from dataset.releases import Folder, Reading, Release, views

COLUMNS = ("Path", "Frontal/Lateral", "AP/PA")
SIGNS = {name: COLUMNS for name in ("train.csv", "valid.csv")}


def _below_top(frame, column, path):
    """The paths of a column without the folders above train/, valid/ and test/."""
    texts = tables.names(frame, column, path)
    short = texts.str.extract(r"(?:^|/)((?:train|valid|test)/[^/]+/[^/]+(?:/[^/]+)?)/*$")[0]
    if short.isna().any():
        row = tables.first_row(short.isna())
        raise UserError(
            f"{path}: {column} is {texts.iloc[row]!r} in data row {row + 1}; expected "
            "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg, or that without its first folder"
        )
    return short


def _tops(folder, path):
    """The folders that train/, valid/ and test/ may lie in: the root, the one a path names, those there."""
    below = sorted(p.name for p in folder.root.iterdir() if p.is_dir() and p.name not in ("train", "valid", "test"))
    return [f"{top}/" if top else "" for top in dict.fromkeys(["", path.strip("/").split("/")[0], *below])]


BATCHES = "CheXpert-v1.0 batch *"


def _in_batches(folder, images):
    """The paths of images in the folders BATCHES; no such paths where there are none."""
    where = {}
    for batch in folder.folders("", BATCHES):
        for split, below in (("train", "/train"), ("valid", "/valid"), ("train", "")):
            where |= {f"{split}/{name}": f"{batch}{below}/{name}" for name in folder.folders(batch + below, "patient*")}
    if where:
        patient = images.str.extract("^([^/]+/[^/]+)")[0]
        yield patient.map(where).fillna(patient) + images.str.extract("^[^/]+/[^/]+(/.*)")[0]


def _test_images(folder, path, tops):
    """groundtruth.csv with a row an image instead of a study."""
    frame = tables.read_csv(path, ("Study",))
    studies = _below_top(frame, "Study", path)
    tables.no_duplicates(studies, "study", path)
    there = [sorted({name for top in tops for name in folder.files(top + study) if name.startswith("view")})
             for study in studies]  # fmt: skip
    if not all(there):
        missing = studies.iloc[[bool(names) for names in there].index(False)]
        raise UserError(f"{path}: {folder.root / missing} holds no image of this study of the test set")
    rows = np.repeat(np.arange(len(frame)), [len(names) for names in there])
    names = pd.Series([name for names in there for name in names])
    side = names.str.contains("lateral").map({True: "Lateral", False: "Frontal"})
    image = studies.iloc[rows].reset_index(drop=True) + "/" + names
    return frame.iloc[rows].reset_index(drop=True).assign(**{"Path": image, "Frontal/Lateral": side, "AP/PA": ""})


def read(folder):
    """The release in a :class:`dataset.releases.Folder` as a :class:`dataset.releases.Reading`."""
    files = {
        split: folder.needed(f"{name}.csv", f"{BATCHES}/{name}.csv", why=f"the {what} split of CheXpert")
        for split, name, what in (("train", "train", "training"), ("validate", "valid", "validation"))
    }
    frames = {split: tables.read_csv(path, COLUMNS) for split, path in files.items()}
    tops = _tops(folder, frames["train"]["Path"].iloc[0])
    test = folder.table("groundtruth.csv", "test/groundtruth.csv")
    test = test or Folder(folder.root.parent).table("groundtruth.csv")
    if test:
        files["test"], frames["test"] = test, _test_images(folder, test, tops)
    images = pd.concat([_below_top(frame, "Path", files[split]) for split, frame in frames.items()], ignore_index=True)
    sides = pd.concat([frame[["Frontal/Lateral", "AP/PA"]] for frame in frames.values()], ignore_index=True)
    parts = images.str.split("/")
    view = views(sides["AP/PA"]).astype(object)
    frontal = sides["Frontal/Lateral"].str.strip() == "Frontal"
    view[~frontal.to_numpy()] = "lateral"
    view[frontal.to_numpy() & ~np.isin(view, ("AP", "PA"))] = "frontal"

    def finding(name):
        return np.concatenate([tables.label_values(frame, (name,), files[s])[:, 0] for s, frame in frames.items()])

    return Reading(
        sources=tuple(files.values()),
        image=images,
        subject=parts.str[1],
        study=parts.str[1] + "/" + parts.str[2],
        view=view.astype(str),
        paths=itertools.chain((top + images for top in tops), _in_batches(folder, images)),
        finding=finding,
        names=LABELS,
        split=np.repeat(list(frames), [len(frame) for frame in frames.values()]),
        lacks_test="" if test else "groundtruth.csv",
    )


RELEASE = Release("chexpert", SIGNS, read, parts=BATCHES)
load_table, table, build = RELEASE.load_table, RELEASE.table, RELEASE.build
