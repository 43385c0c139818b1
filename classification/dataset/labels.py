"""The 14 CheXpert labels, and what uncertain and missing ones become. Needs only NumPy."""

import numpy as np

from common.errors import UserError, did_you_mean

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

# The value of a label that a release has no counterpart of: unknown under every policy.
UNKNOWN = -2.0

BLANK = ("", "nan", "na", "n/a", "null", "none")  # how a value that is not there may be written

# What a policy makes of a label that is not a plain 0 or 1: (-1, not mentioned) -> target. NaN: unknown,
# masked in loss and metrics. smooth: means of the ranges .55 to .85 and 0 to .3 of Pham et al. 2021
# ("Interpreting chest X-rays via CNNs ..."): cross-entropy is linear in its target, so the mean of the range does.
POLICIES = {"zeros": (0.0, 0.0), "ones": (1.0, 1.0), "ignore": (np.nan, np.nan), "smooth": (0.7, 0.15)}


def by_label(policy, label_names, key):
    """One policy for each label, from one name for all or a mapping {default: zeros, Consolidation: ignore}.

    UserError: no such policy or label, named with `key`, the config key it came from.
    """
    given = policy if isinstance(policy, dict) else {"default": policy}
    for name, choice in given.items():
        if name != "default" and name not in label_names:
            raise UserError(f"{key} names the label {name!r}, which is not there{did_you_mean(name, label_names)}")
        if choice not in POLICIES:
            raise UserError(f"{key} is {choice!r}; choose one of {', '.join(POLICIES)}")
    return [given.get(name, given.get("default", "zeros")) for name in label_names]


def apply_policy(raw, label_names, *, uncertain="zeros", missing="zeros", soft=True):
    """Targets of a model from the values of the label files.

    Args:
        raw: [N, L] of 1 (positive), 0 (negative), -1 (uncertain), NaN (not mentioned) and UNKNOWN.
        uncertain, missing: for -1 and for NaN, see :func:`by_label`.
        soft: False for validation and test: nothing can be measured by a smooth target, so it counts as unknown.

    Returns:
        [N, L] float32 of 0, 1, NaN and, where soft, values between.
    """

    def values(policy, key, kind):
        chosen = np.array([POLICIES[p][kind] for p in by_label(policy, label_names, key)])
        return chosen if soft else np.where(np.isin(chosen, (0, 1)), chosen, np.nan)

    of_uncertain, of_missing = values(uncertain, "DATA.UNCERTAIN", 0), values(missing, "DATA.MISSING", 1)
    targets = np.where(np.isnan(raw), of_missing, np.where(raw == -1, of_uncertain, raw))
    targets = np.where(raw == UNKNOWN, np.nan, targets)
    return targets.astype(np.float32)


def unlearnable(dataset):
    """A text for each label of a training split (see `dataset.build.Dataset`) that has but one class or none.

    What no release has a counterpart of is named in the summary, once.
    """
    mapping, texts = getattr(dataset, "label_mapping", {}), []
    for name, target in zip(dataset.label_names, dataset.targets.T):
        positive, negative = int((target == 1).sum()), int((target == 0).sum())
        if len(np.unique(target[~np.isnan(target)])) < 2 and mapping.get(name, {}).get("kind") != "unknown":
            texts.append(
                f"{name} cannot be learnt: the train split has {positive:,} positives and {negative:,} negatives of "
                "it; see DATA.UNCERTAIN and DATA.MISSING"
            )
    return texts
