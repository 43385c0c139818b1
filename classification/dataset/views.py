"""From which side an X-ray was taken, by the columns of the metadata file. Needs only pandas."""

import numpy as np

from dataset.labels import BLANK

# DATA.VIEWS -> the views it keeps. Rare positions (axial, oblique, decubitus) and unknown ones are in none.
# "frontal" is an image of which only that is known.
VIEWS = {"frontal": ("AP", "PA", "frontal"), "AP": ("AP",), "PA": ("PA",), "lateral": ("lateral",)}

_POSITIONS = {"AP": "AP", "PA": "PA", "LATERAL": "lateral", "LL": "lateral"}
_TEXTS = {
    "AP": r"\bAP\b|\bPORTABLE\b|\bANTERO-?POSTERIOR\b",
    "PA": r"\bPA\b|\bPOSTERO-?ANTERIOR\b",
    "lateral": r"\bLAT\b|\bLATERAL\b",
    "other": r"\bDECUB|\bOBLIQ|\bAXIAL\b|\bLORDOTIC\b",
}
TEXT_COLUMNS = (
    "ViewCodeSequence_CodeMeaning",
    "PerformedProcedureStepDescription",
    "ProcedureCodeSequence_CodeMeaning",
)


def find_views(frame):
    """View [N] of each row: AP, PA, lateral, other, or an empty text where it is unknown.

    `ViewPosition` decides. Where it is blank (15,769 images of MIMIC-CXR), the first of TEXT_COLUMNS that
    names exactly one view does: "CHEST (PORTABLE AP)" is AP, "CHEST (PA AND LAT)" does not say which of the two.
    """
    known = {text: _POSITIONS.get(text.strip().upper(), "other") for text in frame["ViewPosition"].unique()}
    known |= {text: "" for text in known if text.strip().lower() in BLANK}
    views = np.array([known[text] for text in frame["ViewPosition"]], dtype=object)
    for column in TEXT_COLUMNS:
        if column in frame:
            text = frame[column].str.upper()
            named = {view: text.str.contains(pattern).to_numpy(bool) for view, pattern in _TEXTS.items()}
            one = np.sum(list(named.values()), axis=0) == 1
            for view, here in named.items():
                views[(views == "") & one & here] = view
    return views
