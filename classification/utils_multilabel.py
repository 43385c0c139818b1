"""Losses, metrics and evaluation of multi-label classification.

Targets are 1, 0 or NaN; NaN is unknown and counts nowhere.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, roc_auc_score

from inference import predict


def _mean_over_known(positive, negative, targets, pos_weight):
    """Mean over the known labels of the two terms (log-likelihoods, [N, L]) that a target chooses between."""
    known, t = ~targets.isnan(), targets.nan_to_num(0.0)
    weight = 1.0 if pos_weight is None else pos_weight.to(targets)
    loss = -(weight * t * positive + (1 - t) * negative)
    return (loss * known).sum() / known.sum().clamp(min=1)


def bce(logits, targets, pos_weight=None):
    """Binary cross-entropy with logits."""
    return _mean_over_known(F.logsigmoid(logits), F.logsigmoid(-logits), targets, pos_weight)


def focal(logits, targets, pos_weight=None, gamma=2.0):
    """Focal loss (Lin et al. 2017, equation 4), for each label: what is already right counts less."""
    p = torch.sigmoid(logits)
    positive, negative = (1 - p) ** gamma * F.logsigmoid(logits), p**gamma * F.logsigmoid(-logits)
    return _mean_over_known(positive, negative, targets, pos_weight)


def asymmetric(logits, targets, pos_weight=None, gamma_positive=0.0, gamma_negative=4.0, margin=0.05):
    """Asymmetric loss (Ridnik et al. 2021, equation 7): easy negatives count less, and below `margin` nothing."""
    p = torch.sigmoid(logits)
    shifted = (p - margin).clamp(min=0)
    positive = (1 - p) ** gamma_positive * F.logsigmoid(logits)
    negative = shifted**gamma_negative * torch.log1p(-shifted)
    return _mean_over_known(positive, negative, targets, pos_weight)


# TRAIN.LOSS -> function(logits [N, L], targets [N, L], pos_weight [L] or None) -> scalar, the mean over known labels
LOSSES = {"bce": bce, "focal": focal, "asymmetric": asymmetric}


def pos_weights(targets, cap):
    """Negatives by positives of each label, between 1/cap and cap; None where cap is 0: [N, L] -> [L]."""
    if cap == 0:
        return None
    positives, negatives = (targets == 1).sum(0), (targets == 0).sum(0)
    return torch.from_numpy(np.clip(negatives / np.maximum(positives, 1), 1 / cap, cap))


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


def multilabel_metrics(logits, targets, label_names):
    """All metrics of a set: loss, mean and by label AUROC and average precision, counts.

    The loss is the cross-entropy of the whole set at once, whatever TRAIN.LOSS: it depends on neither
    batches nor ranks, and runs trained with other losses can be compared by it.
    AUROC: Hanley and McNeil 1982, as scikit-learn computes it; the mean is over the labels that
    have one.
    """
    scores = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
    auc = per_label(roc_auc_score, scores, targets)
    precision = per_label(average_precision_score, scores, targets)
    return {
        "loss": float(bce(torch.from_numpy(logits).float(), torch.from_numpy(targets))),
        "mean_auc": mean_defined(auc),
        "auc": dict(zip(label_names, auc)),
        "mean_average_precision": mean_defined(precision),
        "average_precision": dict(zip(label_names, precision)),
        "positives": {n: int((t == 1).sum()) for n, t in zip(label_names, targets.T)},
        "negatives": {n: int((t == 0).sum()) for n, t in zip(label_names, targets.T)},
        "images": len(targets),
    }


def validate_multilabel(model, loader, world, amp, *, label_names):
    """(mean AUROC, loss, AUROC by label) of a model on a loader, every image once on any number of ranks.

    amp: a function that returns the autocast context.
    """
    logits, targets, _ = predict(model, loader, world, amp)
    metrics = multilabel_metrics(logits, targets, label_names)
    return metrics["mean_auc"], metrics["loss"], metrics["auc"]


def evaluate_test_set(model, loader, world, amp, *, label_names):
    """Dictionary of all metrics of :func:`multilabel_metrics`, and `probabilities`, `targets` [N, L], `rows` [N]."""
    logits, targets, rows = predict(model, loader, world, amp)
    metrics = multilabel_metrics(logits, targets, label_names)
    probabilities = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
    return metrics | {"probabilities": probabilities, "targets": targets, "rows": rows}
