"""What is learned: criterion, logits -> probabilities, metrics, and the figure that chooses the best checkpoint.

A task is a row of `TASKS`; a dataset names its own (`dataset.task`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import utils_multilabel as multilabel
from analysis.text import label_table, number
from training.inference import predict


@dataclass(frozen=True)
class Task:
    """score: the name of the metric that decides, larger is better. details: of what is logged beside it.

    build_criterion(config, targets of the train split) -> function(logits, targets) -> scalar
    probabilities(logits [N, L]) -> [N, L]
    validate(model, loader, world, amp, label_names=, sources=) -> {"loss", score, details}, and with sources (the name
        of that of each image of the dataset, or None) `by_source`, the same of each
    test(model, loader, world, amp, label_names=, sources=) -> those and further metrics, `images` (how many), and the
        arrays `probabilities`, `targets` [N, L] and `rows` [N] (which of the dataset)
    table(metrics) -> text
    report: whether an evaluation ends with one (intervals, thresholds, calibration of labels)
    """

    score: str
    details: str
    build_criterion: Callable
    probabilities: Callable
    validate: Callable
    test: Callable
    table: Callable
    report: bool


# ----------------------------------------------------------------------------- labels, each 0 or 1
def _label_criterion(config, targets):
    weights = multilabel.pos_weights(targets, config.TRAIN.POS_WEIGHT_CAP)
    return multilabel.build_loss(config.TRAIN.LOSS, config.TRAIN.LOSS_OPTIONS, weights)


def _validate_labels(*arguments, label_names, sources):
    found = multilabel.evaluate_split(
        *arguments, label_names=label_names, metrics=multilabel.METRICS[:1], sources=sources
    )
    decides = multilabel.METRICS[0].name
    kept = ("loss", f"mean_{decides}", decides)
    told = {k: found[k] for k in kept}
    if sources is not None:
        told["by_source"] = {name: {k: own[k] for k in kept} for name, own in found["by_source"].items()}
    return told


def _label_table(metrics):
    lines = [label_table(metrics, {metric.name: metric.column for metric in multilabel.METRICS})]
    for name, own in metrics.get("by_source", {}).items():
        means = ", ".join(f"mean {m.column} {number(own[f'mean_{m.name}'])}" for m in multilabel.METRICS)
        lines.append(f"{name}: {means}, {own['images']:,} images")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- one class of many
def _class_criterion(config, _targets):
    # Targets are class indices, or probabilities after mixup.
    return partial(F.cross_entropy, label_smoothing=config.MODEL.LABEL_SMOOTHING)


def _softmax(logits):
    return torch.from_numpy(logits).double().softmax(1).numpy()


def _test_classes(*arguments, label_names, sources):
    logits, targets, rows = predict(*arguments)
    ranks = (logits > np.take_along_axis(logits, targets[:, None], 1)).sum(1)
    return {
        "loss": float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))),
        **{f"acc{k}": float((ranks < k).mean()) for k in (1, 5)},
        "images": len(targets),
        "probabilities": _softmax(logits),
        "targets": np.eye(len(label_names), dtype=np.float32)[targets],
        "rows": rows,
    }


def _class_table(metrics):
    return f"top-1 {metrics['acc1']:.4f}   top-5 {metrics['acc5']:.4f}   {metrics['images']:,} images"


TASKS = {
    "multilabel": Task(
        score=f"mean_{multilabel.METRICS[0].name}",
        details=multilabel.METRICS[0].name,
        build_criterion=_label_criterion,
        probabilities=multilabel.sigmoid,
        validate=_validate_labels,
        test=multilabel.evaluate_test_set,
        table=_label_table,
        report=True,
    ),
    "single_label": Task(
        score="acc1",
        details="acc5",
        build_criterion=_class_criterion,
        probabilities=_softmax,
        validate=_test_classes,
        test=_test_classes,
        table=_class_table,
        report=False,
    ),
}
