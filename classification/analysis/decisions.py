"""Decision curves: what a model is worth to somebody who acts at a probability (Vickers and Elkin 2006)."""

import numpy as np

from analysis.calibration import scale

THRESHOLDS = np.arange(1, 100) / 100


def net_benefit(probabilities, targets, thresholds=THRESHOLDS):
    """True positives minus false positives at the odds of the threshold, per image; [T] of one label [N].

    An image is called positive where its probability is at or above the threshold; targets are 1, 0, NaN (unknown).
    """
    known = ~np.isnan(targets)
    called = probabilities[known][:, None] >= thresholds
    positive = (targets[known] == 1)[:, None]
    return (called & positive).mean(0) - (called & ~positive).mean(0) * thresholds / (1 - thresholds)


def decision_curves(predictions, scaling):
    """{"thresholds", "labels": {label: {"before", "calibrated", "all"}}} of the labels that have both classes.

    before: of the probabilities as predicted; calibrated: as --calibrated applies it, by `scaling` of calibration.fit
    (or None); all: of calling every image positive. Calling none is 0.
    """
    found = {}
    for k, name in enumerate(predictions.label_names):
        p, y = predictions.probabilities[:, k], predictions.targets[:, k]
        if len(set(y[~np.isnan(y)])) < 2:
            continue
        kinds = {"before": p, "all": np.ones_like(p)}
        if scaling:
            kinds["calibrated"] = scale(scaling, scaling["chosen"][name]["method"], name, p)
        found[name] = {kind: [round(float(v), 6) for v in net_benefit(q, y)] for kind, q in kinds.items()}
    return {"thresholds": THRESHOLDS.tolist(), "labels": found}
