"""Losses of multi-label classification, and the evaluation of a model: validation and test.

Targets are 1, 0 or NaN; NaN is unknown and counts nowhere. The table of the metrics is in analysis/metrics.py, which
runs without torch.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from analysis.metrics import METRICS, label_metrics
from common.errors import UserError, did_you_mean
from config import at_least, between
from models.inference import predict

# ----------------------------------------------------------------------------------------- losses
Power, Share = Annotated[float, at_least(0)], Annotated[float, between(0, 1)]


def _mean_over_known(log_likelihoods, logits, targets, pos_weight):
    """Mean over the known labels of -log-likelihood.

    log_likelihoods: function(logits) -> the two terms [N, L] that a target chooses between. Neither the loss nor a
    gradient depends on the logits of unknown labels, whatever their values.
    """
    known, t = ~targets.isnan(), targets.nan_to_num(0.0)
    positive, negative = log_likelihoods(logits.where(known, 0.0))
    weight = 1.0 if pos_weight is None else pos_weight.to(targets)
    loss = -(weight * t * positive + (1 - t) * negative)
    return loss.where(known, 0.0).sum() / known.sum().clamp(min=1)


def bce(logits, targets, pos_weight=None):
    """Binary cross-entropy with logits."""
    return _mean_over_known(lambda x: (F.logsigmoid(x), F.logsigmoid(-x)), logits, targets, pos_weight)


def focal(logits, targets, pos_weight=None, gamma: Power = 2.0):
    """Focal loss (Lin et al. 2017, equation 4), for each label: what is already right counts less."""

    def terms(x):
        # As exp(gamma log p): the derivative of p ** gamma is infinite at 0 for gamma below 1.
        log_p, log_q = F.logsigmoid(x), F.logsigmoid(-x)
        return (gamma * log_q).exp() * log_p, (gamma * log_p).exp() * log_q

    return _mean_over_known(terms, logits, targets, pos_weight)


def asymmetric(
    logits, targets, pos_weight=None, gamma_positive: Power = 0.0, gamma_negative: Power = 4.0, margin: Share = 0.05
):
    """Asymmetric loss (Ridnik et al. 2021, equation 7): easy negatives count less, and below `margin` nothing."""

    def terms(x):
        log_p, log_q = F.logsigmoid(x), F.logsigmoid(-x)
        # log(1 - (p - margin)), 0 where p is below the margin; 1 - p itself would round to 0 from a logit of 17.
        log_rest = torch.logaddexp(log_q, torch.full_like(log_q, margin).log()).clamp(max=0)
        # The lower bound keeps the derivative finite for gamma_negative below 1.
        shifted = (log_p.exp() - margin).clamp(min=1e-12)
        return (gamma_positive * log_q).exp() * log_p, shifted**gamma_negative * log_rest

    return _mean_over_known(terms, logits, targets, pos_weight)


def smooth_bce(logits, targets, pos_weight=None, smoothing: Share = 0.1):
    """Binary cross-entropy with label smoothing (Szegedy et al. 2016): 1 becomes 1 - smoothing/2, 0 smoothing/2."""
    return bce(logits, targets * (1 - smoothing) + smoothing / 2, pos_weight)


# TRAIN.LOSS -> function(logits [N, L], targets [N, L], ...) -> scalar, the mean over the known labels; or a subclass of
# nn.Module with such a `forward`, whose parameters are trained, saved and resumed. Either gets what it names of GIVEN.
# Its other parameters are set by TRAIN.LOSS_OPTIONS; Annotated[float, at_least(0)] bounds one.
LOSSES = {"bce": bce, "focal": focal, "asymmetric": asymmetric, "smooth_bce": smooth_bce}

# What a loss can ask for, as the name of a parameter. Counts are of the train split as it is sampled.
GIVEN = {
    "pos_weight": "weights of the positives [L] by TRAIN.POS_WEIGHT_CAP, or None",
    "positives": "number of positive labels [L]",
    "known": "number of known labels [L]",
    "epoch": "the current epoch, from 0",
    "epochs": "TRAIN.EPOCHS",
}


class Criterion(nn.Module):
    """A loss with its parameters set: criterion(logits, targets) -> scalar, in float32 whatever the autocast.

    given: values of GIVEN but for the epoch. name: the row of LOSSES, under which a checkpoint has its parameters.
    """

    def __init__(self, name, loss, options, given):
        super().__init__()
        self.name, self.given = name, {**given, "epoch": 0}
        if isinstance(loss, type):
            loss, options = loss(**self._asked_by(loss), **options), {}
        self.loss, self.options = loss, options
        self.asked = self._asked_by(loss.forward if isinstance(loss, nn.Module) else loss).keys()

    def _asked_by(self, function):
        return {key: value for key, value in self.given.items() if key in inspect.signature(function).parameters}

    def set_epoch(self, epoch):
        self.given["epoch"] = epoch

    def forward(self, logits, targets):
        with torch.autocast(logits.device.type, enabled=False):
            asked = {key: self.given[key] for key in self.asked}
            loss = self.loss(logits.float(), targets, **asked, **self.options)
        if loss.ndim:
            raise UserError(
                f"TRAIN.LOSS {self.name} returns a tensor of shape {tuple(loss.shape)}; it must return one number, the "
                "mean over the known labels"
            )
        return loss


def build_loss(name, options, **given):
    """The :class:`Criterion` of row `name` of LOSSES; given: values of GIVEN.

    UserError: no such loss, a parameter that it does not have, lacks, or whose value is no number or out of bounds.
    """
    if name not in LOSSES:
        raise UserError(f"TRAIN.LOSS is {name!r}; choose one of {', '.join(LOSSES)}{did_you_mean(name, LOSSES)}")
    parameters = list(inspect.signature(LOSSES[name]).parameters.values())
    parameters = parameters if isinstance(LOSSES[name], type) else parameters[2:]  # without logits and targets
    own = {p.name: p for p in parameters if p.name not in GIVEN and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for parameter, value in options.items():
        if parameter not in own:
            has = f"its parameters are {', '.join(own)}" if own else "it has no parameters"
            raise UserError(f"TRAIN.LOSS_OPTIONS: {name} has no {parameter!r}{did_you_mean(parameter, own)}; {has}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"TRAIN.LOSS_OPTIONS: {parameter} is {value!r}; expected a number")
        for allowed in getattr(own[parameter].annotation, "__metadata__", ()):
            if wrong := allowed(value):
                raise UserError(f"TRAIN.LOSS_OPTIONS: {parameter} is {value!r}; {wrong}")
    if lacking := [p.name for p in own.values() if p.default is p.empty and p.name not in options]:
        raise UserError(f"TRAIN.LOSS_OPTIONS: {name} needs {', '.join(lacking)}, such as {{{lacking[0]}: 1.0}}")
    if given.get("pos_weight") is not None and "pos_weight" not in {p.name for p in parameters}:
        raise UserError(
            f"TRAIN.POS_WEIGHT_CAP has no effect: TRAIN.LOSS {name} has no parameter pos_weight; set it to 0"
        )
    return Criterion(name, LOSSES[name], options, given)


def count_labels(targets, draws):
    """(positives, negatives, known) per label [L] in an epoch that takes image n `draws[n]` times; targets: [N, L]."""
    return tuple(draws @ chosen for chosen in (targets == 1, targets == 0, ~np.isnan(targets)))


def pos_weights(positives, negatives, cap):
    """Negatives / positives of each label [L], between 1/cap and cap; None where cap is 0."""
    return np.clip(negatives / np.maximum(positives, 1), 1 / cap, cap) if cap else None


# ------------------------------------------------------------------------------------- evaluation
def multilabel_metrics(logits, probabilities, targets, label_names):
    """loss, of each metric its mean and its values per label, and counts.

    The loss is the cross-entropy of the whole set at once, whatever TRAIN.LOSS: it depends on neither batches nor
    ranks, and runs trained with other losses can be compared by it.
    """
    found = {"loss": float(bce(torch.from_numpy(logits).float(), torch.from_numpy(targets)))}
    found |= label_metrics(probabilities, targets, label_names, logits)
    for name, value in (("positives", 1), ("negatives", 0)):
        found[name] = {label: int((target == value).sum()) for label, target in zip(label_names, targets.T)}
    return found | {"images": len(targets)}


def evaluate_test_set(model, loader, world, amp, *, label_names, sources=None):
    """Dictionary of `loss`, all METRICS, counts, the arrays `logits`, `probabilities`, `targets` [N, L] and `rows` [N].

    Every image counts once on any number of ranks. amp: a function that returns the autocast context.
    sources: name of the source of each image of the dataset; then `by_source` has the metrics of each.
    """
    logits, targets, rows = predict(model, loader, world, amp)
    probabilities = torch.from_numpy(logits).double().sigmoid().numpy()
    found = multilabel_metrics(logits, probabilities, targets, label_names)
    if sources is not None:
        of_row = sources[rows]
        found["by_source"] = {
            str(name): multilabel_metrics(logits[here], probabilities[here], targets[here], label_names)
            for name in dict.fromkeys(sources.tolist())
            if (here := of_row == name).any()
        }
    return found | {"logits": logits, "probabilities": probabilities, "targets": targets, "rows": rows}


@dataclass(frozen=True)
class Validation:
    """What a validation found; it unpacks as (score, loss, by_label).

    score: by the metric that chooses the best checkpoint, None where no label has a value. by_label: its values.
    record: what metrics.jsonl has of it.
    """

    score: float | None
    loss: float
    by_label: dict
    record: dict

    def __iter__(self):
        return iter((self.score, self.loss, self.by_label))


def validate_multilabel(model, loader, world, amp, *, label_names, metric=None, sources=None):
    """The :class:`Validation` of a model by `metric`, a row of METRICS (by default the first)."""
    metric = metric or METRICS[0]
    found = evaluate_test_set(model, loader, world, amp, label_names=label_names, sources=sources)

    def kept(of):
        return {row.key: of[row.key] for row in METRICS} | {metric.name: of[metric.name]}

    record = {"val_loss": found["loss"], **kept(found)}
    if sources is not None:
        record["by_source"] = {name: {"loss": own["loss"], **kept(own)} for name, own in found["by_source"].items()}
    return Validation(found[metric.key], found["loss"], found[metric.name], record)
