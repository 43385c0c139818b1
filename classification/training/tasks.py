"""What is learned: criterion, metrics, validation and test.

A task is a row of `TASKS`; a dataset names its own (`dataset.task`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import utils_multilabel as multilabel
from analysis import classes
from analysis.evaluation import read_evaluation
from analysis.metrics import METRICS, Metric
from analysis.results import Options
from analysis.text import label_table, number
from analysis.writing import write_report
from common.errors import UserError, did_you_mean
from config import KNOBS
from models.inference import predict


@dataclass(frozen=True)
class Task:
    """build_criterion(config, targets of the train split, draws [N], device) -> utils_multilabel.Criterion
        draws: how often an epoch takes each image
    known(targets, batch_size) -> of the terms of a full batch, the share that the criterion is the mean of: a tensor
    metrics() -> the rows, each with `key` and `higher_is_better`, of which TRAIN.BEST_BY names one
    validate(model, loader, world, amp, label_names=, metric=, sources=) -> utils_multilabel.Validation; sources: the
        name of that of each image of the dataset, or None
    test(model, loader, world, amp, label_names=, sources=) -> {"loss", metrics, `images` (how many)}, and the arrays
        `rows` [N] (which of the dataset) and, of labels, `probabilities`, `logits`, `targets` [N, L]; of classes
        `columns`, what the table of predictions has of each image
    table(metrics) -> text
    report(folder of an evaluation) -> its headline; writes the report there
    labels: each is 0 or 1, with a policy, thresholds and calibration of its own
    """

    build_criterion: Callable
    known: Callable
    metrics: Callable
    validate: Callable
    test: Callable
    table: Callable
    report: Callable
    labels: bool

    def best_metric(self, best_by):
        """The row of the metrics that TRAIN.BEST_BY names; the first where the task does not have the option's default.

        UserError: no such metric.
        """
        rows = {metric.key: metric for metric in self.metrics()}
        if best_by not in rows and best_by != KNOBS["TRAIN.BEST_BY"].default:
            choices = f"choose one of {', '.join(rows)}{did_you_mean(best_by, rows)}"
            raise UserError(f"TRAIN.BEST_BY is {best_by!r}; {choices}")
        return rows.get(best_by, self.metrics()[0])


# ----------------------------------------------------------------------------- labels, each 0 or 1
def _label_criterion(config, targets, draws, device):
    positives, negatives, known = multilabel.count_labels(targets, draws)
    given = {
        "pos_weight": multilabel.pos_weights(positives, negatives, config.TRAIN.POS_WEIGHT_CAP),
        "positives": positives,
        "known": known,
    }
    given = {key: None if value is None else torch.from_numpy(value).float().to(device) for key, value in given.items()}
    loss, options = config.TRAIN.LOSS, config.TRAIN.LOSS_OPTIONS
    return multilabel.build_loss(loss, options, epochs=config.TRAIN.EPOCHS, **given).to(device)


def _label_table(found):
    lines = [label_table(found, {metric.name: metric.column for metric in METRICS})]
    for name, own in found.get("by_source", {}).items():
        means = ", ".join(f"mean {m.column} {number(own[m.key])}" for m in METRICS)
        lines.append(f"{name}: {means}, {own['images']:,} images")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- one class of many
class ClassMetric(Metric):
    """A metric of classes: `function(above [N], equal [N])` -> its value for each image, of which it is the mean.

    above: how many classes have a larger logit than the right one; equal: how many have the same, itself included.
    """

    @property
    def key(self):
        return self.name


def _among_first(k):
    """How probable it is that the right class is among the first k, if chance decides between equal logits."""
    return lambda above, equal: ((k - above) / equal).clip(0, 1)


CLASS_METRICS = [ClassMetric("acc1", "top-1", _among_first(1)), ClassMetric("acc5", "top-5", _among_first(5))]
LISTED = 5  # most probable classes in the table of predictions


def _class_criterion(config, _targets, _draws, device):
    # Targets are class indices, or probabilities after mixing.
    loss = partial(F.cross_entropy, label_smoothing=config.MODEL.LABEL_SMOOTHING)
    return multilabel.Criterion("cross_entropy", loss, {}, {}).to(device)


def _test_classes(*arguments, label_names, sources=None):
    logits, targets, rows = predict(*arguments)
    own, names = np.take_along_axis(logits, targets[:, None], 1), np.array(label_names)
    above, equal = (logits > own).sum(1), (logits == own).sum(1)
    values = {metric.key: metric.function(above, equal) for metric in CLASS_METRICS}
    best, total = np.argsort(-logits, 1, kind="stable")[:, :LISTED], torch.from_numpy(logits).logsumexp(1).numpy()
    columns = {"target": names[targets]}
    for k, chosen in enumerate(best.T, start=1):
        columns[f"prediction_{k}"] = names[chosen]
        columns[f"probability_{k}"] = np.exp(logits[np.arange(len(logits)), chosen] - total)
    absent = np.flatnonzero(np.bincount(targets, minlength=len(names)) == 0)
    return {
        "loss": float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))),
        **{key: float(value.mean()) for key, value in values.items()},
        "images": len(targets),
        "absent": names[absent].tolist(),
        "columns": columns | values,
        "rows": rows,
    }


def _validate_classes(*arguments, label_names, metric, sources=None):
    found = _test_classes(*arguments, label_names=label_names)
    record = {"val_loss": found["loss"], **{row.key: found[row.key] for row in CLASS_METRICS}}
    return multilabel.Validation(found[metric.key], found["loss"], {}, record)


def _class_table(found):
    figures = [f"{metric.column} {found[metric.key]:.4f}" for metric in CLASS_METRICS]
    return "   ".join([*figures, f"{found['images']:,} images"])


TASKS = {
    "multilabel": Task(
        build_criterion=_label_criterion,
        known=lambda targets, batch_size: (~targets.isnan()).sum() / (batch_size * targets.shape[1]),
        metrics=lambda: METRICS,
        validate=multilabel.validate_multilabel,
        test=multilabel.evaluate_test_set,
        table=_label_table,
        report=lambda folder: write_report(read_evaluation(folder), Options(), folder)["headline"],
        labels=True,
    ),
    "single_label": Task(
        build_criterion=_class_criterion,
        known=lambda targets, batch_size: torch.full((), len(targets) / batch_size, device=targets.device),
        metrics=lambda: CLASS_METRICS,
        validate=_validate_classes,
        test=_test_classes,
        table=_class_table,
        report=classes.write_report,
        labels=False,
    ),
}
