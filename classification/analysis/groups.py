"""Subgroups: which group each image is in, from the predictions and from tables of the user's own."""

import numpy as np
import pandas as pd

from analysis.evaluation import clean_id
from common.errors import UserError
from dataset.tables import read_csv

KEYS = ("dicom_id", "path", "study_id", "subject_id")  # the finest that both tables have joins them
MOST = 12  # groups of a column; with more it is cut into bands, or left out
AGES = (0, 18, 40, 60, 80, np.inf)
PATIENTS = {"gender": "sex", "anchor_age": "age band"}  # patients.csv.gz of MIMIC-IV
NAMES = {"sex": "sex", "gender": "sex", "age": "age band", "anchor_age": "age band"}


def _bands(values, edges, last):
    """Each number's band as text: '18-39', ..., '80 and over'."""
    names = [f"{low:g}-{high - 1:g}" for low, high in zip(edges[:-2], edges[1:-1])] + [last.format(edges[-2])]
    index = np.digitize(values, edges[1:-1])
    return np.where(np.isnan(values), "", np.array(names, dtype=object)[index])


def age_bands(column):
    """Text of ages -> bands; '85 or more' counts as 85."""
    number = column.astype("string").str.extract(r"(\d+(?:\.\d+)?)")[0]
    return _bands(pd.to_numeric(number, errors="coerce").to_numpy(float, na_value=np.nan), AGES, "{:g} and over")


def _grouped(name, column):
    """(groups [N] as text, blank where unknown; reason to leave the column out, or None)."""
    if NAMES.get(name.lower()) == "age band":
        return age_bands(column), None
    text = column.astype("string").str.strip().fillna("")
    known = text[text != ""]
    if known.nunique() <= MOST:
        return text.to_numpy(object), None
    numbers = pd.to_numeric(text, errors="coerce")
    if numbers[text != ""].isna().any():
        return None, f"{known.nunique():,} different values; at most {MOST} make groups"
    quarters = pd.qcut(numbers, 4, duplicates="drop")
    return quarters.astype("string").fillna("").to_numpy(object), None


def read_table(path, predictions, required=True):
    """Columns of a CSV joined to the images: name -> (groups [N] or None, reason where None).

    The CSV has one of KEYS; `patients.csv.gz` of MIMIC-IV (gender, anchor_age) gives sex and age bands only.
    required: that it knows any of the images.

    Raises:
        UserError: no key, several rows a key, or none of the images' patients.
    """
    frame = read_csv(path, ())
    key = next((k for k in KEYS if k in frame and k in predictions.ids), None)
    if key is None:
        raise UserError(
            f"{path}: no column to join it to the predictions by; expected one of "
            f"{', '.join(k for k in KEYS if k in predictions.ids) or ', '.join(KEYS)} "
            f"(the file has: {', '.join(frame.columns)})"
        )
    frame[key] = clean_id(frame[key])
    wanted = [c for c in frame if c not in KEYS]
    if set(PATIENTS) <= set(frame):
        wanted = list(PATIENTS)
    if not wanted:
        raise UserError(f"{path}: no column besides {key}; nothing to group by")
    frame = frame[[key, *wanted]].drop_duplicates()
    if frame[key].duplicated().any():
        row = frame[key][frame[key].duplicated()].iloc[0]
        raise UserError(f"{path}: {key} {row} has several rows that differ; give one row each")
    rows = pd.Index(frame[key]).get_indexer(predictions.ids[key])
    if (rows < 0).all() and required:
        raise UserError(
            f"{path}: none of the {predictions.ids[key].nunique():,} values of {key} in {predictions.path} is there"
        )
    found = {}
    for name in wanted:
        column = frame[name].iloc[rows].reset_index(drop=True)
        column[rows < 0] = pd.NA
        found[NAMES.get(name.lower(), name)] = _grouped(name, column)
    return found


def find_groups(predictions, tables, required=True):
    """Variables to group by, those of the images and the tables' columns: name -> (groups [N], or None; reason where
    None)."""
    found = {"view": (None, "the predictions have no column view")}
    for name in ("source", "view", "sex", "age"):
        if name in predictions.ids:
            found[NAMES.get(name, name)] = _grouped(name, predictions.ids[name])
    for path in tables:
        found |= read_table(path, predictions, required)
    for name in ("sex", "age band"):
        found.setdefault(name, (None, "not known; give patients.csv.gz of MIMIC-IV, or another table, with --groups"))
    return found
