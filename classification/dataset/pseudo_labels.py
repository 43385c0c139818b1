"""Labels that a model gives (DATA.PSEUDO_LABELS): the table that predict.py wrote fills what is unknown in train.

Runs without torch. Whom the model has seen is checked in `training/teachers.py`.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import UserError
from common.files import sha256
from dataset import tables
from dataset.labels import LABELS
from dataset.tables import SPLITS

KEY = "DATA.PSEUDO_LABELS"


def _stem(path):
    return os.path.splitext(os.path.normpath(path))[0]  # a copy has JPGs


def _rows(frame, paths, source):
    """Row of the predictions for each of `paths` [N], relative to the folder of the images; -1 where there is none."""
    wanted = [_stem(path.decode()) for path in paths.tolist()]
    depths, rows = {path.count("/") + 1 for path in wanted}, {}
    for row, text in enumerate(frame["path"]):
        for path in text.split(";"):  # of a study those of its images
            parts = _stem(path).split("/")
            for depth in depths:
                rows.setdefault("/".join(parts[-depth:]), set()).add(row)
    found = [rows.get(path, ()) for path in wanted]
    if twice := [path for path, here in zip(wanted, found) if len(here) > 1]:
        raise UserError(
            f"{KEY} {source}: the image {twice[0]} has several rows; predict one release a table, an image once"
        )
    return np.array([next(iter(here), -1) for here in found])


def _teachers(path):
    """{"checkpoints": paths, "checkpoints_sha256"} of the models that predicted a table, by run.json beside it."""
    beside = path.parent / "run.json"
    try:
        entry = json.loads(beside.read_text())[path.name]
        return {"checkpoints": entry["checkpoint_paths"], "checkpoints_sha256": entry["command"]["checkpoints"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{KEY} {path}: {beside} does not say which model predicted it, so whether that has seen the validation or "
            "test patients cannot be known; give a table that predict.py wrote, with run.json beside it"
        ) from error


def _unknown(table, name):
    return table.label_mapping[name]["kind"] == "unknown"


def fill_unknown(table, path):
    """(the table with the targets of train that are unknown filled by probabilities, a record of it).

    table: with targets. path: of a table of predict.py; its images are known by the end of their paths, whatever the
    suffix, its labels by their names.

    Record: path, sha256, checkpoints, checkpoints_sha256, images (how many got labels), filled: {label: number}.

    UserError: no such table, other images or labels, no probabilities, or nothing to fill.
    """
    path = Path(path).expanduser()
    frame = tables.read_csv(path, ("path",))
    teachers = _teachers(path)
    names = [name for name in table.label_names if name in frame]
    if not names:
        raise UserError(f"{KEY} {path} has none of the labels {', '.join(table.label_names)} (it has: "
                        f"{', '.join(frame.columns)})")  # fmt: skip
    tables.need_columns(frame, names, path)  # each once
    train = np.flatnonzero(table.split == SPLITS.index("train"))
    if absent := [n for n in table.label_names if n not in frame and n not in LABELS and _unknown(table, n)]:
        raise UserError(f"{KEY} {path}: neither it nor the data has the label {absent[0]!r}")
    rows = _rows(frame, table.path[train], path)
    if (rows < 0).all():
        raise UserError(
            f"{KEY} {path} has none of the {len(train):,} training images, such as {table.path[train[0]].decode()} "
            f"(its first is {frame['path'].iloc[0]}); predict the images of this data set, with their paths"
        )
    targets, filled = table.targets.copy(), {}
    for name in names:
        values = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float32)
        if bad := [text for text, value in zip(frame[name], values) if text and not 0 <= value <= 1]:
            raise UserError(f"{KEY} {path}: {name} is {bad[0]!r}; expected a probability from 0 to 1")
        k = table.label_names.index(name)
        given = np.where(rows < 0, np.nan, values[rows])
        unknown = np.isnan(targets[train, k]) & ~np.isnan(given)
        targets[train[unknown], k] = given[unknown]
        filled[name] = int(unknown.sum())
    changed = (np.isnan(table.targets[train]) & ~np.isnan(targets[train])).any(1)
    if not changed.any():
        raise UserError(
            f"{KEY} {path} fills nothing: no label of its images is unknown in train (DATA.MISSING ignore makes blanks "
            "unknown)"
        )
    left = int(np.isnan(targets[train]).sum())
    counts = ", ".join(f"{name} {n:,}" for name, n in filled.items() if n)
    note = (
        f"{KEY} {path.name}: {sum(filled.values()):,} unknown labels of {int(changed.sum()):,} of the {len(train):,} "
        f"training images filled ({counts}); {left:,} stay unknown"
    )
    with open(path, "rb") as file:
        digest = sha256(file)
    record = {"path": str(path), "sha256": digest, **teachers, "images": int(changed.sum()), "filled": filled}
    return dataclasses.replace(table, targets=targets, notes=(*table.notes, note)), record
