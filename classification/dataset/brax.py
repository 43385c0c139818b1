"""BRAX (DATA.DATASET brax): master_spreadsheet_update.csv, images as DICOM or PNG. It has no splits.

Labels are CheXpert's, by its labeler, in another order.
"""

from dataset import tables
from dataset.labels import LABELS
from dataset.releases import Reading, Release, views

PATHS = ("PngPath", "DicomPath")
SIGNS = {"master_spreadsheet*.csv": ("PatientID", "AccessionNumber")}


def read(folder):
    """The release in a :class:`dataset.releases.Folder` as a :class:`dataset.releases.Reading`."""
    newest, any_version = "master_spreadsheet_update.csv", "master_spreadsheet*.csv"  # the update replaces the other
    source = folder.needed(newest, any_version, why="the table of BRAX")
    frame = tables.read_csv(source, ("PatientID", "AccessionNumber", "ViewPosition"))
    given = [column for column in PATHS if column in frame and (frame[column].str.strip() != "").all()]
    if not given:
        tables.need_columns(frame, PATHS, source)
    paths = [tables.names(frame, column, source) for column in given or PATHS]
    return Reading(
        sources=(source,),
        image=paths[-1],
        subject=tables.names(frame, "PatientID", source),
        study=tables.names(frame, "AccessionNumber", source),
        view=views(frame["ViewPosition"]),
        paths=[*paths, *(path.str.partition("/")[2] for path in paths)],  # or without the folder of all
        finding=lambda name: tables.label_values(frame, (name,), source)[:, 0],
        names=LABELS,
    )


RELEASE = Release("brax", SIGNS, read, uses=("DATA.SPLIT_SEED",))
load_table, table, build = RELEASE.load_table, RELEASE.table, RELEASE.build
