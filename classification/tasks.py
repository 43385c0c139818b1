"""What is learned: criterion, metrics and the score that chooses the best checkpoint.

A task is a row of `TASKS`; a dataset names its own (`dataset.task`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import utils_multilabel as multilabel
from analysis.text import auc_table
from errors import UserError
from inference import predict


@dataclass(frozen=True)
class Task:
    """criterion(logits, targets) -> scalar; score: the name of the figure that decides, larger is better.

    validate(model, loader, world, amp) -> (score, loss, details by name)
    test(model, loader, world, amp) -> dictionary of metrics with `images` (how many), and the arrays `probabilities`,
        `targets` [N, L] and `rows` [N] (which of the dataset)
    table(metrics) -> text
    """

    criterion: Callable
    score: str
    validate: Callable
    test: Callable
    table: Callable


def _multilabel(config, dataset):
    if config.TRAIN.LOSS not in multilabel.LOSSES:
        raise UserError(f"TRAIN.LOSS is {config.TRAIN.LOSS!r}; choose one of {', '.join(multilabel.LOSSES)}")
    weights = multilabel.pos_weights(dataset.targets, config.TRAIN.POS_WEIGHT_CAP)
    label_names = dataset.label_names
    return Task(
        criterion=partial(multilabel.LOSSES[config.TRAIN.LOSS], pos_weight=weights),
        score="mean_auc",
        validate=partial(multilabel.validate_multilabel, label_names=label_names),
        test=partial(multilabel.evaluate_test_set, label_names=label_names),
        table=auc_table,
    )


def _single_label(config, dataset):
    def criterion(logits, targets):  # class indices, or probabilities after mixup
        return F.cross_entropy(logits, targets, label_smoothing=config.MODEL.LABEL_SMOOTHING)

    def test(model, loader, world, amp):
        logits, targets, rows = predict(model, loader, world, amp)
        ranks = (logits > np.take_along_axis(logits, targets[:, None], 1)).sum(1)
        loss = float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets)))
        accuracy = {f"acc{k}": float((ranks < k).mean()) for k in (1, 5)}
        probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
        one_hot = np.eye(len(dataset.label_names), dtype=np.float32)[targets]
        arrays = {"probabilities": probabilities, "targets": one_hot, "rows": rows}
        return {"loss": loss, **accuracy, "images": len(targets), **arrays}

    def validate(*arguments):
        metrics = test(*arguments)
        return metrics["acc1"], metrics["loss"], {"acc5": metrics["acc5"]}

    def table(metrics):
        return f"top-1 {metrics['acc1']:.4f}   top-5 {metrics['acc5']:.4f}   {metrics['images']:,} images"

    return Task(criterion=criterion, score="acc1", validate=validate, test=test, table=table)


TASKS = {"multilabel": _multilabel, "single_label": _single_label}


def build_task(config, dataset):
    """The task of a dataset; the criterion weighs by its targets, so to train give the train split."""
    return TASKS[dataset.task](config, dataset)
