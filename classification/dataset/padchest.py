"""PadChest (DATA.DATASET padchest): its one table, images in numbered folders (ImageDir). It has no splits.

Ids have up to 36 digits and are read as text. `Labels` is a Python list as text, whose terms are compared whole.
"""

import ast

import numpy as np
import pandas as pd

from common.errors import UserError
from dataset import tables
from dataset.labels import BLANK
from dataset.releases import Reading, Release, views

COLUMNS = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "MethodLabel", "Labels")
SIGNS = {"*.csv": ("ImageID", "ImageDir", "MethodLabel")}
PROJECTIONS = {"AP_horizontal": "AP", "UNK": "", "POSTEROANTERIOR": "PA", "ANTEROPOSTERIOR": "AP"}


def read_terms(text):
    """The set of terms in the text of a list; None where it is none."""
    if text.strip().lower() in BLANK:
        return frozenset()
    try:
        terms = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None
    whole = isinstance(terms, list) and all(isinstance(term, str) for term in terms)
    return frozenset(term.strip().lower() for term in terms) - {""} if whole else None


def read(folder, labelled_by="physicians"):
    """The release in a :class:`dataset.releases.Folder` as a :class:`dataset.releases.Reading`.

    labelled_by: physicians, all, or None: also the images without labels.
    """
    source = folder.needed("*.csv", why="the table of PadChest", columns=SIGNS["*.csv"])
    frame = tables.read_csv(source, COLUMNS)
    by_others = ~frame["MethodLabel"].str.strip().str.lower().str.startswith("physician").to_numpy(bool)
    reason = np.full(len(frame), "", object)
    if labelled_by == "physicians":
        reason[by_others] = "image labelled by a network (DATA.LABELLED_BY physicians)"
    codes, texts = pd.factorize(frame["Labels"])
    sets = [read_terms(text) for text in texts]
    if None in sets:
        row = tables.first_row(codes == sets.index(None))
        raise UserError(
            f"{source}: Labels is {frame['Labels'].iloc[row]!r} in data row {row + 1}; expected a list ['term', ...]"
        )
    if labelled_by is not None:
        reason[(reason == "") & np.array([not terms for terms in sets])[codes]] = "image without labels"
        reason[(reason == "") & np.array(["exclude" in terms for terms in sets])[codes]] = "image labelled exclude"
    kept = reason == ""
    if not kept.any():
        raise UserError(f"{source}: no image is left ({', '.join(dict.fromkeys(reason))})")
    frame, codes = frame[kept], codes[kept]
    projection = frame["Projection"].str.strip()
    if "ViewPosition_DICOM" in frame:
        projection = projection.where(projection != "", frame["ViewPosition_DICOM"].str.strip())
    image = tables.names(frame, "ImageID", source)
    return Reading(
        sources=(source,),
        image=image,
        subject=tables.names(frame, "PatientID", source),
        study=tables.names(frame, "StudyID", source),
        view=views(projection, PROJECTIONS),
        paths=(tables.names(frame, "ImageDir", source) + "/" + image, image, "images/" + image),
        finding=lambda name: np.array([name in terms for terms in sets], np.float32)[codes],
        names=tuple(sorted(set().union(*sets))),
        left_out=dict(pd.Series(reason[~kept]).value_counts()),
    )


RELEASE = Release("padchest", SIGNS, read, {"labelled_by": "DATA.LABELLED_BY"}, uses=("DATA.SPLIT_SEED",),
                  all_images={"labelled_by": None})  # fmt: skip
load_table, table, build = RELEASE.load_table, RELEASE.table, RELEASE.build
