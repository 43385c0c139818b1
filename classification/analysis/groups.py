"""Subgroups: which group each image is in, from the predictions and from tables of the user's own."""

import functools
import re
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.evaluation import clean_id
from common.errors import UserError
from dataset.tables import need_columns, read_csv

KEYS = ("dicom_id", "path", "study_id", "subject_id")  # the finest that both tables have joins them
MOST = 12  # groups of a column; with more it is cut into bands, or left out
AGES = (0, 18, 40, 60, 80, np.inf)
OLDEST = 120  # years; NIH's table has ages of 400
# The number of each unit in a year: DICOM's 018M, or words.
UNITS = {"y": 1, "m": 12, "w": 365.25 / 7, "d": 365.25}
AGE = re.compile(
    r"(?:>=?|over )?\s*(\d+(?:\.\d+)?)\s*(y|m|w|d)?(?:(?<=y)(?:ears?|rs?|o)|(?<=m)(?:onths?|os?)|(?<=w)(?:eeks?|ks?)|"
    r"(?<=d)(?:ays?))?\s*(?:old)?\s*(?:\+|(?:or|and) (?:more|over|older|above))?",
    re.IGNORECASE,
)
PATIENTS = {"gender": "sex", "anchor_age": "age band"}  # patients.csv.gz of MIMIC-IV
NAMES = {"sex": "sex", "gender": "sex", "age": "age band", "anchorage": "age band"}
METADATA = {"StudyDate", "StudyTime", "PerformedProcedureStepDescription"}  # of MIMIC-CXR's metadata.csv.gz
DATES = ("study_date", "StudyDate")
NO_DATE = (
    "{count:,} images by anchor_age, the age in anchor_year and not at the study: they have no StudyDate (give "
    "MIMIC-CXR's metadata.csv.gz with --groups)"
)


def _group_name(column):
    """'sex' and 'age band' whatever a table calls them (gender, PatientAge, ...), else the column's own name."""
    return NAMES.get(re.sub("[^a-z]", "", column.lower()).removeprefix("patient"), column)


def read_age(text):
    """Years as a number: '45', '045Y', '018M', '52W', '72 months', '85 or more' (85); NaN where it is no age."""
    found = AGE.fullmatch(text)
    years = float(found[1]) / UNITS[(found[2] or "y").lower()] if found else np.nan
    return years if years <= OLDEST else np.nan


def age_bands(column, added=0.0):
    """(bands [N], blank where unknown; what has to be said, or None) of texts of ages and years to add to them."""
    text = column.astype("string").str.strip().fillna("")
    years = text.map({value: read_age(value) for value in text.unique()}).to_numpy(float)
    wrong = text[np.isnan(years) & (text != "")]
    remark = f"{len(wrong):,} images have no age that can be read, such as {wrong.iloc[0]!r}" if len(wrong) else None
    names = [f"{low:g}-{high - 1:g}" for low, high in zip(AGES[:-2], AGES[1:-1])] + [f"{AGES[-2]:g} and over"]
    bands = np.array(names, dtype=object)[np.digitize(years + added, AGES[1:-1])]
    return np.where(np.isnan(years + added), "", bands), remark


def _grouped(name, column):
    """(groups [N] as text, blank where unknown, or None; a remark, or the reason to leave the column out)."""
    if _group_name(name) == "age band":
        return age_bands(column)
    text = column.astype("string").str.strip().fillna("")
    known = text[text != ""]
    if known.nunique() <= MOST:
        return text.to_numpy(object), None
    numbers = pd.to_numeric(text, errors="coerce")
    if numbers[text != ""].isna().any():
        return None, f"{known.nunique():,} different values; at most {MOST} make groups"
    quarters = pd.qcut(numbers, 4, duplicates="drop")
    return quarters.astype("string").fillna("").to_numpy(object), None


# The report asks for the groups of several tables of predictions; a metadata.csv.gz has 377,110 rows.
@functools.lru_cache(maxsize=8)
def _read(path, _version):
    """A CSV as text, with the columns that are of use of the two tables that are recognised."""
    frame = read_csv(path, ())
    need_columns(frame, frame.columns, path)
    keys = [key for key in KEYS if key in frame]
    if METADATA <= set(frame):
        frame = frame[[*keys, "StudyDate"]]
    elif set(PATIENTS) <= set(frame):
        frame = frame[[*keys, *(c for c in (*PATIENTS, "anchor_year") if c in frame)]]
    return frame


def _one_row_each(frame, key, path):
    """The table with one row a key, and no other keys."""
    wanted = [c for c in frame if c not in KEYS]
    if not wanted:
        raise UserError(f"{path}: no column besides {key}; nothing to group by")
    frame = frame[[key, *wanted]].assign(**{key: clean_id(frame[key])}).drop_duplicates()
    if frame[key].duplicated().any():
        row = frame[key][frame[key].duplicated()].iloc[0]
        raise UserError(f"{path}: {key} {row} has several rows that differ; give one row each")
    return frame.set_index(key)


def _joined(path, predictions, required):
    """The rows of a CSV for each image, [N]: a table of its columns but the keys, blank where it has no such row.

    UserError: no key, several rows a key, or none of the images' patients where `required`.
    """
    stat = Path(path).stat() if Path(path).is_file() else None
    frame = _read(path, stat and (stat.st_mtime_ns, stat.st_size))
    key = next((k for k in KEYS if k in frame and k in predictions.ids), None)
    if key is None:
        raise UserError(
            f"{path}: no column to join it to the predictions by; expected one of "
            f"{', '.join(k for k in KEYS if k in predictions.ids) or ', '.join(KEYS)} "
            f"(the file has: {', '.join(frame.columns)})"
        )
    frame = _one_row_each(frame, key, path)
    rows = frame.index.get_indexer(predictions.ids[key])
    if (rows < 0).all() and required:
        raise UserError(
            f"{path}: none of the {predictions.ids[key].nunique():,} values of {key} in {predictions.path} is there"
        )
    found = frame.iloc[rows].reset_index(drop=True)
    found[rows < 0] = ""
    return found


def _year(column):
    return pd.to_numeric(column.astype("string").str.extract(r"^\s*(\d{4})")[0], errors="coerce").to_numpy(float)


def _anchored(joined, years):
    """Age bands at the study: anchor_age is the age in anchor_year; years: of the studies [N], NaN where unknown."""
    since = years - _year(joined["anchor_year"]) if "anchor_year" in joined else np.full(len(joined), np.nan)
    bands, remark = age_bands(joined["anchor_age"], np.nan_to_num(since))
    if count := int((np.isnan(since) & (bands != "")).sum()):
        remark = "; ".join(filter(None, [remark, NO_DATE.format(count=count)]))
    return bands, remark


def read_table(path, predictions, required=True, years=None):
    """Columns of a CSV joined to the images: name -> (groups [N] or None, remark or reason where None).

    The CSV has one of KEYS. Two tables are recognised: `patients.csv.gz` of MIMIC-IV gives sex and age bands only,
    `metadata.csv.gz` of MIMIC-CXR the studies' dates.
    required: that it knows any of the images. years: of the studies [N], NaN where unknown.

    UserError: see :func:`_joined`.
    """
    joined = _joined(path, predictions, required)
    years = np.full(len(joined), np.nan) if years is None else years
    found = {}
    for column in joined:
        if column == "anchor_year" or column in DATES:
            continue
        value = _anchored(joined, years) if column == "anchor_age" else _grouped(column, joined[column])
        _add(found, column, value, path)
    return found


def _add(found, column, value, path):
    """Put the groups of a column under its name, or under another one where that is taken."""
    name, (groups, remark) = _group_name(column), value
    if found.get(name, (None,))[0] is not None:
        taken, name = name, f"{name} ({Path(path).name})"
        text = f"there is a {taken} already, so the column {column} of {path} is named {name}"
        value = groups, "; ".join(filter(None, [remark, text]))
    if found.get(name, (None,))[0] is not None:
        raise UserError(f"--groups: {path} has a column {column}, and there is a {name} already; rename the column")
    found[name] = value


def listed(groups):
    """The different groups of a variable, [N] or None, in order and without the blank one."""
    return [] if groups is None else [g for g in sorted(set(groups)) if g]


def find_groups(predictions, tables, required=True):
    """Variables to group by, those of the images and the tables' columns: name -> (groups [N], or None; remark, or the
    reason where None)."""
    found = {"view": (None, "the predictions have no column view")}
    for name in ("source", "view", "sex", "age"):
        if name in predictions.ids:
            found[_group_name(name)] = _grouped(name, predictions.ids[name])
    years = np.full(len(predictions), np.nan)
    for path in tables:
        joined = _joined(path, predictions, required)
        for column in (c for c in DATES if c in joined):
            years = np.where(np.isnan(years), _year(joined[column]), years)
    for path in tables:
        for name, value in read_table(path, predictions, required, years).items():
            _add(found, name, value, path)
    for name in ("sex", "age band"):
        found.setdefault(name, (None, "not known; give patients.csv.gz of MIMIC-IV, or another table, with --groups"))
    return found
