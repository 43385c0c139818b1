"""The 14 CheXpert labels and what becomes of uncertain and missing ones. Knows only NumPy."""

import numpy as np

from errors import UserError

# The order of the MIMIC-CXR label files; targets, logits and tables all follow it.
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)

# What a policy makes of a label that is not a plain 0 or 1. NaN: unknown, masked in loss and metrics.
POLICIES = {"zeros": 0.0, "ones": 1.0, "ignore": np.nan}


def apply_policy(raw, *, uncertain="zeros", missing="zeros"):
    """Targets of a model from the values of the label files.

    Args:
        raw: [N, L] of 1 (positive), 0 (negative), -1 (uncertain) and NaN (not mentioned).
        uncertain, missing: one of `POLICIES`, for -1 and for NaN.

    Returns:
        [N, L] float32 of 0, 1 and NaN.
    """
    for key, policy in (("DATA.UNCERTAIN", uncertain), ("DATA.MISSING", missing)):
        if policy not in POLICIES:
            raise UserError(f"{key} is {policy!r}; choose one of {', '.join(POLICIES)}")
    targets = np.where(np.isnan(raw), POLICIES[missing], np.where(raw == -1, POLICIES[uncertain], raw))
    return targets.astype(np.float32)
