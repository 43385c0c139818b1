"""Operating points: thresholds chosen on the validation split, and what they do on the test split.

An image is called positive where its probability is at or above the threshold.
"""

import numpy as np

from analysis.statistics import Ranking, wilson

RULES = {
    "youden": "largest sensitivity + specificity",
    "f1": "largest F1",
    "sensitivity": "sensitivity of at least {sensitivity:g}",
    "specificity": "specificity of at least {specificity:g}",
}
RATES = ("sensitivity", "specificity", "ppv", "npv")


def choose(probabilities, targets, sensitivity=0.9, specificity=0.9):
    """Threshold of one label by every rule, from the validation split, [N] each: rule -> threshold, or None.

    Of equal thresholds the highest; a fixed sensitivity takes the highest threshold that reaches it, a fixed
    specificity the lowest. None where the split has one class only, or no threshold reaches the rate.
    """
    ranking = Ranking(probabilities, targets, np.zeros(len(targets), int))
    if not ranking.both:
        return dict.fromkeys(RULES)
    tp, fp = ranking.count[True], ranking.count[False]
    positives, negatives = tp[-1], fp[-1]
    at = {
        "youden": np.argmax(tp / positives - fp / negatives),
        "f1": np.argmax(2 * tp / (tp + fp + positives)),
        "sensitivity": np.argmax(tp / positives >= sensitivity),
    }
    strict = np.flatnonzero(1 - fp / negatives >= specificity)
    at["specificity"] = strict[-1] if len(strict) else None
    return {rule: None if at[rule] is None else float(ranking.thresholds[at[rule]]) for rule in RULES}


def apply(threshold, probabilities, targets, cluster):
    """Counts and rates of one label, [N], at a threshold: tp, fp, fn, tn, and each of RATES with its interval.

    A rate whose denominator is 0 is None.
    """
    known = ~np.isnan(targets)
    called, positive, cluster = probabilities[known] >= threshold, targets[known] == 1, cluster[known]
    kinds = {"tp": called & positive, "fp": called & ~positive, "fn": ~called & positive, "tn": ~called & ~positive}
    patients = int(cluster.max(initial=-1)) + 1
    by_patient = {kind: np.bincount(cluster[rows], minlength=patients) for kind, rows in kinds.items()}
    total = {kind: int(counts.sum()) for kind, counts in by_patient.items()}
    found = {"threshold": threshold, **total}
    for rate, hit, miss in zip(RATES, ("tp", "tn", "tp", "tn"), ("fn", "fp", "fp", "fn")):
        whole = total[hit] + total[miss]
        low, high = wilson(by_patient[hit], by_patient[hit] + by_patient[miss])
        found[rate] = {"value": total[hit] / whole if whole else None, "low": low, "high": high}
    return found


def f1(point):
    """F1 of the counts of :func:`apply`; 0 without a true positive."""
    return 2 * point["tp"] / max(2 * point["tp"] + point["fp"] + point["fn"], 1)
