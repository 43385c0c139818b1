"""The paths of the images of a release, and its tables: the plan of `dataset.synthetic` in the forms of
MIMIC-CXR, CXR-LT, CheXpert, NIH ChestX-ray14, PadChest, VinDr-CXR and BRAX.

A layout is a function of the rows of the plan, one an image (see `dataset.synthetic.tree.image_rows`), and returns

    rows      those that the release would hold, with `image` (the id that its tables use), `file` (path in the tree)
              and `form` (of `dataset.synthetic.files.SAVERS`)
    tables    {path in the tree: table, or text}

Each release has only its own terms: labels without a counterpart are not written. A release without a word for
"uncertain" (all but MIMIC-CXR, CheXpert and BRAX) leaves these findings out. Images keep their own size in all of them.
"""

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml

from dataset import vindr as vindr_labels
from dataset.cxr_lt import TASKS
from dataset.labels import LABELS

FINDINGS = yaml.safe_load(Path(__file__).with_name("findings.yaml").read_text(encoding="utf-8"))


class Layout(NamedTuple):
    write: Callable  # (rows, format) -> (rows, tables), as above
    entries: tuple  # patterns of everything that it writes into the folder of the tree
    formats: tuple  # of its images, the usual one first
    dataset: str  # DATA.DATASET


def _hex(count, *key):
    return hashlib.sha256(" ".join(map(str, key)).encode()).hexdigest()[:count]


def _digits(count, *key):
    """A number of so many digits that belongs to a key. The first half is the same for all, as in real ids: read as
    floating-point numbers, they would be one."""
    return "2168401113669640122833938341520090271603"[: count // 2] + str(int(_hex(64, *key), 16))[: count - count // 2]


def _either(row, *names):
    """One of several names for a sign, the same for all images of a study."""
    return names[row["study_seed"] % len(names)]


# ------------------------------------------------------------------------------------------------------- MIMIC-CXR
def mimic(rows, form):
    """JPG or DICOM, the three official tables."""
    suffix, form = {"jpg": (".jpg", "jpg"), "dicom": (".dcm", "hospital")}[form]
    subject, study = rows["subject_id"].astype(str), rows["study_id"].astype(str)
    file = "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + rows["dicom_id"] + suffix
    rows = rows.assign(image=rows["dicom_id"], file=file, form=form)
    portable = rows["study_id"].isin(rows.loc[rows["view"] == "AP", "study_id"])
    several = rows["study_id"].isin(rows.loc[rows["view"] == "LATERAL", "study_id"])
    procedure = np.where(several, "CHEST (PA AND LAT)", "CHEST (SINGLE VIEW)")
    procedure = np.where(portable, "CHEST (PORTABLE AP)", procedure)
    codes = {"PA": "postero-anterior", "AP": "antero-posterior", "LATERAL": "lateral"}
    metadata = pd.DataFrame(
        {
            **rows[["dicom_id", "subject_id", "study_id"]],
            "PerformedProcedureStepDescription": procedure,
            "ViewPosition": rows["view"],
            **rows[["Rows", "Columns"]],
            "StudyDate": rows["date"],
            "StudyTime": rows["time"],
            "ProcedureCodeSequence_CodeMeaning": procedure,
            "ViewCodeSequence_CodeMeaning": rows["view"].map(codes),
            "PatientOrientationCodeSequence_CodeMeaning": np.where(portable, "Recumbent", "Erect"),
        }
    )
    labels = rows.drop_duplicates("study_id")[["subject_id", "study_id", *LABELS]]
    split = rows[["dicom_id", "study_id", "subject_id", "split"]]
    tables = {"chexpert": labels, "split": split, "metadata": metadata}
    return rows, {f"mimic-cxr-2.0.0-{name}.csv.gz": table for name, table in tables.items()}


# -------------------------------------------------------------------------------------------------------- CheXpert
CHEXPERT_LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip


def chexpert(rows, _form):
    """JPG; Path begins with the folder that the tree itself is, AP/PA is blank for laterals, one Sex is Unknown; valid
    and test are read by radiologists, 1 or 0, and test is a table by study."""
    folder = rows["split"].map({"train": "train", "validate": "valid", "test": "test"})
    study = folder + rows["patient"].map("/patient{:05d}".format) + rows["study"].map("/study{}".format)
    side = np.where(rows["view"] == "LATERAL", "lateral", "frontal")
    file = study + rows["number"].map("/view{}_".format) + side + ".jpg"
    rows = rows.assign(image=file, file=file, form="jpg", study_path="CheXpert-v1.0-small/" + study)
    consensus = rows["split"] != "train"
    values = rows[list(CHEXPERT_LABELS)]
    values = values.where(~consensus, values.eq(1).astype(float))
    table = pd.DataFrame(
        {
            "Path": "CheXpert-v1.0-small/" + file,
            "Sex": rows["sex"].map({"F": "Female", "M": "Male"}),
            "Age": rows["age"],
            "Frontal/Lateral": np.where(rows["view"] == "LATERAL", "Lateral", "Frontal"),
            "AP/PA": rows["view"].replace("LATERAL", ""),
            **values,
        }
    )
    alone = rows[~consensus].groupby("patient")["file"].transform("size")
    table.loc[alone.idxmin(), ["Sex", "Age"]] = "Unknown", 0
    test = table.assign(Study=rows["study_path"])[rows["split"] == "test"].drop_duplicates("Study")
    return rows, {
        "train.csv": table[~consensus],
        "valid.csv": table[rows["split"] == "validate"],
        "groundtruth.csv": test[["Study", *CHEXPERT_LABELS]],
    }


# ---------------------------------------------------------------------------------------------------------- CXR-LT
def cxr_lt(rows, form):
    """Images as in MIMIC-CXR; the tables of 2023 and 2024 beside them, with splits of their own, a leading s in
    study_id, 4% blank views, and 0 for what is not 1. Some rare labels have no positives."""
    rows, _ = mimic(rows, form)
    people = sorted(set(rows["subject_id"]), key=lambda subject: _hex(16, "cxr-lt", subject))
    place = rows["subject_id"].map({subject: k / len(people) for k, subject in enumerate(people)})
    blank = rows["image_seed"] % 25 == 0
    codes = {"PA": "postero-anterior", "AP": "antero-posterior", "LATERAL": "lateral"}
    head = pd.DataFrame(
        {
            **rows[["dicom_id", "subject_id"]],
            "study_id": "s" + rows["study_id"].astype(str),
            "ViewPosition": rows["view"].where(~blank, ""),
            "ViewCodeSequence_CodeMeaning": rows["view"].map(codes).where(~blank, ""),
            "fpath": rows["file"].str.replace(".dcm", ".jpg"),
        }
    )

    def value(name):
        shown, one_in = FINDINGS["cxr_lt"].get(name, [[name], 1])
        known = [rows[label].eq(1) if label in rows else pd.Series(False, rows.index) for label in shown]
        chosen = rows["study_seed"].map(lambda seed: int(_hex(8, name, seed), 16) % one_in == 0)
        return (np.logical_and.reduce(known) & chosen).astype(int)

    splits = {"train": place >= 0.3, "development": place < 0.12, "test": (place >= 0.12) & (place < 0.3)}
    found = {}
    for task, names in TASKS.items():
        year, _, number = task.partition("-")
        values = {name: value("Normal" if name == "No Finding" else name) for name in names}
        table = head.assign(**values)
        for split, chosen in splits.items():
            ending = f"_labeled{f'_task{number}' if split != 'train' else ''}" if number else ""
            found.setdefault(f"cxr-lt-{year}/{split}{ending}.csv", table[chosen])  # one train table for both tasks
    return rows, found


# ------------------------------------------------------------------------------------------------ NIH ChestX-ray14
def _present(row, findings):
    """The names of a release for the labels of a row that are 1."""
    return [_either(row, *names) for label, names in findings.items() if row[label] == 1]


def nih(rows, _form):
    """PNG, a few RGBA, in twelve folders; frontal views only; No Finding if there is none of its own findings."""
    rows = rows[rows["view"] != "LATERAL"].reset_index(drop=True)
    follow_up = rows.groupby("patient").cumcount()
    image = rows["patient"].map("{:08d}_".format) + follow_up.map("{:03d}.png".format)
    folder = (1 + 12 * np.arange(len(rows)) // len(rows)).astype(str)
    file = "images_" + pd.Series(folder).str.zfill(3) + "/images/" + image
    rows = rows.assign(image=image, file=file, form=np.where(np.arange(len(rows)) % 8 == 3, "rgba", "png"))
    found = (sorted(_present(row, FINDINGS["nih"])) for row in rows.to_dict("records"))
    entries = pd.DataFrame(
        {
            "Image Index": image, "Finding Labels": ["|".join(names) or "No Finding" for names in found],
            "Follow-up #": follow_up, "Patient ID": rows["patient"], "Patient Age": rows["age"],
            "Patient Gender": rows["sex"], "View Position": rows["view"],
            # The brackets hold commas: two columns each.
            "OriginalImage[Width": rows["Columns"], "Height]": rows["Rows"],
            "OriginalImagePixelSpacing[x": 0.143, "y]": 0.143,
        }
    )  # fmt: skip
    lists = {"train_val_list.txt": rows["split"] != "test", "test_list.txt": rows["split"] == "test"}
    return rows, {
        "Data_Entry_2017_v2020.csv": entries,
        **{name: "".join(image[chosen] + "\n") for name, chosen in lists.items()},
    }


# -------------------------------------------------------------------------------------------------------- PadChest
PADCHEST_TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"


def padchest(rows, _form):
    """16-bit PNG below folders with numbers, ids of many digits, no splits, findings as a Python list in text with
    stray blanks and empty items, of physicians or a network."""
    image = pd.Series([f"{_digits(38, 'study', r.study_id)}_{_hex(6, r.dicom_id)}.png" for r in rows.itertuples()])
    folder = pd.Series(np.arange(len(rows)) % 3 * 7)
    rows = rows.assign(image=image, file=folder.astype(str) + "/" + image, form="png16")
    physician = rows["study_seed"] % 100 < 27
    found = []
    for row, read in zip(rows.to_dict("records"), physician):
        findings = _present(row, FINDINGS["padchest"])
        findings += ["fissure thickening", "scoliosis"][: row["study_seed"] // 100 % 3] if findings else ["normal"]
        found.append(repr([f" {name}" for name in findings] + [""] if read else findings))
    table = pd.DataFrame(
        {
            "": np.arange(len(rows)), "ImageID": image, "ImageDir": folder, "StudyDate_DICOM": rows["date"],
            "StudyID": [_digits(38, "study", study) for study in rows["study_id"]],
            "PatientID": [_digits(36, "patient", subject) for subject in rows["subject_id"]],
            "PatientBirth": rows["date"] // 10_000 - rows["age"], "PatientSex_DICOM": rows["sex"],
            "ViewPosition_DICOM": rows["view"],
            "Projection": rows["view"].map({"PA": "PA", "AP": "AP_horizontal", "LATERAL": "L"}),
            "MethodProjection": "Manual review of DICOM fields", "Pediatric": "No",
            "Rows_DICOM": rows["Rows"], "Columns_DICOM": rows["Columns"],
            "MethodLabel": np.where(physician, "Physician", "RNN_model"), "Labels": found, "Localizations": "[]",
        }
    )  # fmt: skip
    return rows, {PADCHEST_TABLE: table}


# ------------------------------------------------------------------------------------------------------- VinDr-CXR
def vindr(rows, _form):
    """DICOM named .dicom, frontal views only, no patients. In train three readers an image, of whom two or three see
    what is there, and one what is uncertain; in test their consensus."""
    rows = rows[rows["view"] != "LATERAL"].reset_index(drop=True)
    image = rows["dicom_id"].str.replace("-", "").str[:32]
    test = rows["split"] == "test"
    rows = rows.assign(image=image, form="dicom")
    rows["file"] = np.where(test, "test/", "train/") + image + ".dicom"
    train_lines, test_lines = [], []
    for row in rows.to_dict("records"):
        rng = np.random.default_rng([row["image_seed"], 2])
        votes = np.zeros((3, len(vindr_labels.FINDINGS)), int)
        for label in filter(FINDINGS["vindr"].get, LABELS):
            agree = rng.permutation(3)
            seen = rng.integers(2, 4) if row[label] == 1 else int(row[label] == -1)
            votes[agree[:seen], vindr_labels.FINDINGS.index(_either(row, *FINDINGS["vindr"][label]))] = 1
        if row["split"] == "test":
            votes = votes.sum(0, keepdims=True) // 2
        votes[:, -1] = 1 - votes[:, :-1].max(1)
        if row["split"] == "test":
            test_lines.append([row["image"], *votes[0]])
        else:
            readers = sorted(rng.choice(np.arange(1, 18), 3, replace=False))
            train_lines += [[row["image"], f"R{reader}", *line] for reader, line in zip(readers, votes)]
    plural = [name.replace("Other disease", "Other diseases") for name in vindr_labels.FINDINGS]  # both are in use
    return rows, {
        "annotations/image_labels_train.csv": pd.DataFrame(train_lines, columns=["image_id", "rad_id", *plural]),
        "annotations/image_labels_test.csv": pd.DataFrame(test_lines, columns=["image_id", *vindr_labels.FINDINGS]),
    }


# ------------------------------------------------------------------------------------------------------------ BRAX
BRAX_LABELS = (*CHEXPERT_LABELS[:3], "Lung Lesion", "Lung Opacity", *CHEXPERT_LABELS[5:])


def brax(rows, _form):
    """PNG (the table has the paths of the DICOMs too), labels as in CheXpert in another order, no splits, an age of
    "85 or more"."""
    patient = "id_" + rows["subject_id"].map(lambda subject: str(uuid.UUID(_hex(32, "patient", subject))))
    accession = rows["study_id"].map(lambda study: _digits(16, "study", study))
    stem = patient + "/Study_" + accession + "/Series_" + accession + "/image-" + rows["dicom_id"]
    file = "images/" + stem + ".png"
    rows = rows.assign(image=file, file=file, form="png")
    table = pd.DataFrame(
        {
            "DicomPath": "Anonymized_DICOMs/" + stem + ".dcm",
            "PngPath": file,
            "PatientID": patient,
            "PatientSex": rows["sex"],
            "PatientAge": rows["age"].map(lambda age: "85 or more" if age >= 85 else str(age // 5 * 5)),
            "AccessionNumber": accession,
            "StudyDate": rows["date"],
            **rows[list(BRAX_LABELS)],
            "ViewPosition": rows["view"].replace("LATERAL", "L"),
            **rows[["Rows", "Columns"]],
            "Manufacturer": "Synthetic",
        }
    )
    return rows, {"master_spreadsheet_update.csv": table}


LAYOUTS = {
    "mimic": Layout(mimic, ("files", "mimic-cxr-2.0.0-*.csv.gz"), ("jpg", "dicom"), "mimic_cxr"),
    "chexpert": Layout(
        chexpert, ("train", "valid", "test", "train.csv", "valid.csv", "groundtruth.csv"), ("jpg",), "chexpert"
    ),
    "cxr_lt": Layout(cxr_lt, ("files", "cxr-lt-202[34]"), ("jpg", "dicom"), "cxr_lt"),
    "nih": Layout(nih, ("images_*", "Data_Entry_2017_v2020.csv", "*_list.txt"), ("png",), "nih"),
    "padchest": Layout(padchest, ("[0-9]", "[0-9][0-9]", PADCHEST_TABLE), ("png",), "padchest"),
    "vindr": Layout(vindr, ("train", "test", "annotations"), ("dicom",), "vindr"),
    "brax": Layout(brax, ("images", "master_spreadsheet_update.csv"), ("png",), "brax"),
}
