"""Losses, metrics and evaluation of multi-label classification.

Targets are 1, 0 or NaN; NaN is unknown and counts nowhere.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, roc_auc_score

from utils import predict


def bce(logits, targets):
    """Mean binary cross-entropy with logits over the known labels: [N, L], [N, L] -> scalar."""
    known = ~targets.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(0.0), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


# TRAIN.LOSS -> function(logits [N, L], targets [N, L]) -> scalar
LOSSES = {"bce": bce}


def per_label(metric, scores, targets):
    """`metric(target, score)` of every label with both classes among its known targets, else None.

    scores, targets: [N, L]. An AUROC of one class does not exist (scikit-learn would warn and
    return NaN); None becomes null in JSON and a dash in tables.
    """
    values = []
    for score, target in zip(scores.T, targets.T):
        known = ~np.isnan(target)
        both = len(np.unique(target[known])) == 2
        values.append(float(metric(target[known], score[known])) if both else None)
    return values


def mean_defined(values):
    """Mean over the defined values; None if there is none."""
    defined = [v for v in values if v is not None]
    return float(np.mean(defined)) if defined else None


def multilabel_metrics(logits, targets, label_names, criterion):
    """All metrics of a set: loss, mean and by label AUROC and average precision, counts.

    The loss is that of the whole set at once: it depends on neither batches nor ranks.
    AUROC: Hanley and McNeil 1982, as scikit-learn computes it; the mean is over the labels that
    have one.
    """
    scores = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
    auc = per_label(roc_auc_score, scores, targets)
    precision = per_label(average_precision_score, scores, targets)
    return {
        "loss": float(criterion(torch.from_numpy(logits).float(), torch.from_numpy(targets))),
        "mean_auc": mean_defined(auc),
        "auc": dict(zip(label_names, auc)),
        "mean_average_precision": mean_defined(precision),
        "average_precision": dict(zip(label_names, precision)),
        "positives": {n: int((t == 1).sum()) for n, t in zip(label_names, targets.T)},
        "negatives": {n: int((t == 0).sum()) for n, t in zip(label_names, targets.T)},
        "images": len(targets),
    }


def validate_multilabel(model, loader, world, amp, *, criterion, label_names):
    """(mean AUROC, loss, AUROC by label) of a model on a loader, every image once on any number of ranks.

    amp: a function that returns the autocast context.
    """
    logits, targets = predict(model, loader, world, amp)
    metrics = multilabel_metrics(logits, targets, label_names, criterion)
    return metrics["mean_auc"], metrics["loss"], metrics["auc"]


def evaluate_test_set(model, loader, world, amp, *, criterion, label_names):
    """Dictionary of all metrics of :func:`multilabel_metrics`, and `probabilities`, `targets` [N, L]."""
    logits, targets = predict(model, loader, world, amp)
    metrics = multilabel_metrics(logits, targets, label_names, criterion)
    probabilities = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
    return metrics | {"probabilities": probabilities, "targets": targets}


def auc_table(metrics):
    """Lines of label, AUROC, average precision and counts; a dash where one class is missing."""

    def number(value):
        return "-" if value is None else f"{value:.4f}"

    rows = [("label", "AUROC", "AP", "positive", "negative")]
    rows += [
        (name, number(auc), number(metrics["average_precision"][name]),
         f"{metrics['positives'][name]:,}", f"{metrics['negatives'][name]:,}")
        for name, auc in metrics["auc"].items()
    ]  # fmt: skip
    rows.append(("mean", number(metrics["mean_auc"]), number(metrics["mean_average_precision"]), "", ""))
    width = max(len(r[0]) for r in rows)
    lines = [r[0].ljust(width) + "".join(c.rjust(10) for c in r[1:]) for r in rows]
    return "\n".join([*lines, *undefined_note(metrics["auc"])])


def undefined_note(auc):
    """One line that names the labels without an AUROC, or none."""
    names = [name for name, value in auc.items() if value is None]
    return [f"no AUROC (one class only), left out of the mean: {', '.join(names)}"] if names else []
