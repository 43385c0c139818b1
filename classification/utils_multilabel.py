"""Losses, metrics and evaluation of multi-label classification.

Targets are 1, 0 or NaN; NaN is unknown and counts nowhere.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, roc_auc_score

from common.errors import UserError, did_you_mean
from training.inference import predict


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


def smooth_bce(logits, targets, pos_weight=None, smoothing=0.1):
    """Binary cross-entropy with label smoothing (Szegedy et al. 2016): 1 becomes 1 - smoothing/2, 0 smoothing/2."""
    return bce(logits, targets * (1 - smoothing) + smoothing / 2, pos_weight)


# TRAIN.LOSS -> function(logits [N, L], targets [N, L], pos_weight [L] or None, parameters of its own) -> scalar, the
# mean over the known labels. TRAIN.LOSS_OPTIONS sets the parameters.
LOSSES = {"bce": bce, "focal": focal, "asymmetric": asymmetric, "smooth_bce": smooth_bce}


def build_loss(name, options, pos_weight=None):
    """function(logits, targets) -> scalar: row `name` of LOSSES with its parameters set.

    Raises:
        UserError: no such loss, or a parameter that it has not or that is no number.
    """
    if name not in LOSSES:
        raise UserError(f"TRAIN.LOSS is {name!r}; choose one of {', '.join(LOSSES)}{did_you_mean(name, LOSSES)}")
    known = list(inspect.signature(LOSSES[name]).parameters)[3:]
    for parameter, value in options.items():
        if parameter not in known:
            has = f"its parameters are {', '.join(known)}" if known else "it has no parameters"
            raise UserError(f"TRAIN.LOSS_OPTIONS: {name} has no {parameter!r}{did_you_mean(parameter, known)}; {has}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"TRAIN.LOSS_OPTIONS: {parameter} is {value!r}; expected a number")
    return partial(LOSSES[name], pos_weight=pos_weight, **options)


def pos_weights(targets, cap):
    """Negatives by positives of each label, between 1/cap and cap; None where cap is 0: [N, L] -> [L]."""
    if cap == 0:
        return None
    positives, negatives = (targets == 1).sum(0), (targets == 0).sum(0)
    return torch.from_numpy(np.clip(negatives / np.maximum(positives, 1), 1 / cap, cap))


@dataclass(frozen=True)
class Metric:
    """A figure of one label: `function(targets of 0 and 1 [N], probabilities [N])`.

    name: in metrics.json, by label; its mean over the labels is there as `mean_<name>`. column: of the table.
    """

    name: str
    column: str
    function: Callable


# The first decides which checkpoint is best.
METRICS = [
    Metric("auc", "AUROC", roc_auc_score),  # Hanley and McNeil 1982
    Metric("average_precision", "AP", average_precision_score),
]


def per_label(function, probabilities, targets):
    """`function(target, probability)` of every label with both classes among its known targets, else None.

    probabilities, targets: [N, L]. An AUROC of one class does not exist (scikit-learn would warn and
    return NaN); None becomes null in JSON and a dash in tables.
    """
    values = []
    for probability, target in zip(probabilities.T, targets.T):
        known = ~np.isnan(target)
        both = len(np.unique(target[known])) == 2
        values.append(float(function(target[known], probability[known])) if both else None)
    return values


def mean_defined(values):
    """Mean over the defined values; None if there is none."""
    defined = [v for v in values if v is not None]
    return float(np.mean(defined)) if defined else None


def sigmoid(logits):
    """Probabilities of logits, float32 [N, L] -> float64 [N, L]."""
    return torch.sigmoid(torch.from_numpy(logits).double()).numpy()


def multilabel_metrics(logits, probabilities, targets, label_names, metrics):
    """loss, of each of `metrics` its mean and its values by label, and counts.

    The loss is the cross-entropy of the whole set at once, whatever TRAIN.LOSS: it depends on neither
    batches nor ranks, and runs trained with other losses can be compared by it. A mean is over the labels
    that have a value.
    """
    found = {"loss": float(bce(torch.from_numpy(logits).float(), torch.from_numpy(targets)))}
    for metric in metrics:
        values = per_label(metric.function, probabilities, targets)
        found |= {f"mean_{metric.name}": mean_defined(values), metric.name: dict(zip(label_names, values))}
    for name, value in (("positives", 1), ("negatives", 0)):
        found[name] = {label: int((target == value).sum()) for label, target in zip(label_names, targets.T)}
    return found | {"images": len(targets)}


def evaluate_split(model, loader, world, amp, *, label_names, metrics, sources=None):
    """:func:`multilabel_metrics` of the images of a loader, and the arrays `probabilities`, `targets`, `rows`.

    Every image counts once on any number of ranks. amp: a function that returns the autocast context.
    sources: name of the source of each image of the dataset; then `by_source` has the metrics of each.
    """
    logits, targets, rows = predict(model, loader, world, amp)
    probabilities = sigmoid(logits)
    found = multilabel_metrics(logits, probabilities, targets, label_names, metrics)
    if sources is not None:
        of_row = sources[rows]
        found["by_source"] = {
            str(name): multilabel_metrics(logits[here], probabilities[here], targets[here], label_names, metrics)
            for name in dict.fromkeys(sources.tolist())
            if (here := of_row == name).any()
        }
    return found | {"probabilities": probabilities, "targets": targets, "rows": rows}


def validate_multilabel(model, loader, world, amp, *, label_names):
    """(mean, loss, values by label) of the metric that decides: mean AUROC, loss, AUROC by label."""
    decides = METRICS[0]
    found = evaluate_split(model, loader, world, amp, label_names=label_names, metrics=[decides])
    return found[f"mean_{decides.name}"], found["loss"], found[decides.name]


def evaluate_test_set(model, loader, world, amp, *, label_names, sources=None):
    """Dictionary of all METRICS and the counts, and the arrays, see :func:`evaluate_split`."""
    return evaluate_split(model, loader, world, amp, label_names=label_names, metrics=METRICS, sources=sources)
