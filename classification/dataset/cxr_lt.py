"""CXR-LT (DATA.DATASET cxr_lt): the tables of its challenges, with splits and labels of their own, on the images of
MIMIC-CXR-JPG, which lie beside the tables or in DATA.IMAGES. DATA.CXR_LT names year and task.

Labels are 0 or 1. 2023 calls No Finding what 2024 calls Normal: neither has any of CXR-LT's findings.
"""

from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd

from common.errors import UserError
from dataset import tables
from dataset.files.images import SUFFIXES
from dataset.releases import MOST_FOLDERS, Folder, Reading, Release, data_folder, find_root
from dataset.views import find_views

NORMAL = ("No Finding", "Normal")
TASK_OF_26 = (
    "Atelectasis", "Calcification of the Aorta", "Cardiomegaly", "Consolidation", "Edema", "Emphysema",
    "Enlarged Cardiomediastinum", "Fibrosis", "Fracture", "Hernia", "Infiltration", "Lung Lesion", "Lung Opacity",
    "Mass", "No Finding", "Nodule", "Pleural Effusion", "Pleural Other", "Pleural Thickening", "Pneumomediastinum",
    "Pneumonia", "Pneumoperitoneum", "Pneumothorax", "Subcutaneous Emphysema", "Support Devices", "Tortuous Aorta",
)  # fmt: skip
ADDED_TO_40 = (
    "Adenopathy", "Azygos Lobe", "Clavicle Fracture", "Fissure", "Granuloma", "Hydropneumothorax", "Infarction",
    "Kyphosis", "Lobar Atelectasis", "Pulmonary Embolism", "Pulmonary Hypertension", "Rib Fracture",
    "Round(ed) Atelectasis", "Tuberculosis",
)  # fmt: skip
SECOND = tuple(name.replace(*NORMAL) for name in TASK_OF_26)
TASKS = {"2023": TASK_OF_26, "2024-1": tuple(sorted((*SECOND, *ADDED_TO_40))), "2024-2": SECOND}
SIGNS = {f"{split}*.csv": ("dicom_id", "Tortuous Aorta", "Hernia") for split in ("train", "development", "test")}
DEFAULTS = {"TRAIN.BEST_BY": "mean_average_precision"}  # the challenge's score
LEVELS = 4  # folders, that of the tables and those above it, in or beside which images are looked for


def _holding(place, in_zip):
    """Those of a folder and the folders in it that hold `files/` with images; JPGs are preferred to DICOM."""
    endings = {}
    for one in (place, *islice(place.glob("*"), MOST_FOLDERS), *place.glob("mimic-cxr*/*")):
        some = one.glob("*.zip") if in_zip else (p for study in one.glob("files/p1*/p1*/s5*") for p in study.glob("*"))
        endings[one] = {path.suffix for path in islice(some, 10)}
    found = [one for one, kinds in endings.items() if ".jpg" in kinds] or [one for one in endings if endings[one]]
    return [place] if place in found else found


def find_images(folder, named="", in_zip=False):
    """The folder that holds `files/` (or zip files of it): the one named, else the nearest to `folder`.

    UserError: none, or several that are as near.
    """
    tried = [folder, *folder.parents][:LEVELS]
    if named:
        place = data_folder(named, "DATA.IMAGES or --images")
        tried = [place.parent if place.name == "files" else place]
    found = next(filter(None, (_holding(place, in_zip) for place in tried)), [])
    what = "zip files" if in_zip else "files/p10/p10000032/s50414267/*.jpg or .dcm"
    remedy = "name the folder of MIMIC-CXR-JPG, or of its small copy, with DATA.IMAGES (main.py) or --images"
    if not found:
        raise UserError(f"DATA.IMAGES: {named or f'beside {folder}'} has no images ({what}); {remedy}")
    if len(found) > 1:
        raise UserError(f"several folders have images ({', '.join(map(str, sorted(found)))}); {remedy}")
    return found[0]


def _find_tables(folder, task):
    """{split: path} of the tables of a task that are there."""
    _, _, number = task.partition("-")
    ending = f"_labeled_task{number}" if number else ""
    names = {
        "train": "train_labeled" if number else "train",
        "validate": f"development{ending}",
        "test": f"test{ending}",
    }
    found = {split: folder.table(f"{name}.csv") for split, name in names.items()}
    return {split: path for split, path in found.items() if path}


def read(folder, task="", images=""):
    """The release in a :class:`dataset.releases.Folder` as a :class:`dataset.releases.Reading`.

    task: a key of TASKS; empty: the first whose tables are there. images: read by :meth:`CxrLt.folder`.
    """
    there = {name: found for name in TASKS if (found := _find_tables(folder, name))}
    task = task or next(iter(there), "")
    if task not in there:
        others = f"; it has those of {' and '.join(there)}: set DATA.CXR_LT {next(iter(there))}" if there else ""
        raise UserError(f"{folder.places} has no tables of CXR-LT {task}{others}")
    files = there[task]
    frames = {}
    for split, path in files.items():
        frame = tables.read_csv(path, ("dicom_id", "subject_id", "study_id", "ViewPosition", *TASKS[task]))
        frame = frame.rename(columns={"path": "fpath"} if "fpath" not in frame else {})
        tables.need_columns(frame, ("fpath",), path)
        frame["fpath"] = tables.names(frame, "fpath", path)
        frame["subject_id"] = tables.integer_ids(frame, "subject_id", path).astype(str)
        frame["dicom_id"] = tables.names(frame, "dicom_id", path)
        frames[split] = frame.assign(study_id=tables.names(frame, "study_id", path).str.removeprefix("s"), split=split)
    whole = pd.concat(frames.values(), ignore_index=True)

    def finding(name):
        name = next(other for other in TASKS[task] if other in NORMAL) if name in NORMAL else name
        values = [tables.label_values(frame, (name,), files[split])[:, 0] for split, frame in frames.items()]
        for (split, frame), of_split in zip(frames.items(), values):
            if (bad := ~np.isin(of_split, (0, 1))).any():
                text, row = frame[name][bad].iloc[0], tables.first_row(bad) + 1
                raise UserError(f"{files[split]}: label {name!r} is {text!r} in data row {row}; expected 1 or 0")
        return np.concatenate(values)

    return Reading(
        sources=tuple(files.values()),
        image=whole["dicom_id"],
        subject=whole["subject_id"],
        study=whole["study_id"],
        view=find_views(whole).astype(str),
        paths=[whole["fpath"].str.replace(r"\.\w+$", "", regex=True)],
        suffixes=SUFFIXES,
        finding=finding,
        names=tuple(dict.fromkeys((*TASKS[task], *NORMAL))),
        split=whole["split"].to_numpy(str),
        notes=(f"CXR-LT {task}, images in {folder.root}",),
        default_labels=lambda: (TASKS[task], ()),
    )


class CxrLt(Release):
    """CXR-LT, whose images lie elsewhere than its tables."""

    def folder(self, root, in_zip=False, task="", images=""):
        found = find_root(root, self.name, self.signs, of_several=f"*{task[:4]}*")
        return Folder(find_images(found, images, in_zip), in_zip, tables=found)

    def learned_labels(self, root, csv=""):
        self.find_own_csv(root, csv)
        return self.read(Folder(find_root(root, self.name, self.signs))).default_labels()[0]

    def tables_to_copy(self, root, table, csv=""):
        """Those of all tasks of the year."""
        folder = Folder(table.sources[0].parent)
        every = dict.fromkeys(path for task in TASKS for path in _find_tables(folder, task).values())
        return super().tables_to_copy(root, replace(table, sources=tuple(every)), csv)


RELEASE = CxrLt(
    "cxr_lt", SIGNS, read, {"task": "DATA.CXR_LT", "images": "DATA.IMAGES"}, ("DATA.SPLIT_SEED",),
    all_images={"task": ""}, population="mimic_cxr", primary_metric="average_precision",
    label_groups={"head": 0.1, "medium": 0.01, "tail": 0.0},
)  # fmt: skip
load_table, table, build = RELEASE.load_table, RELEASE.table, RELEASE.build
