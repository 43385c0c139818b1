"""The metrics of labels, one table for training, --eval and the report; runs without torch.

Targets are 1, 0 or NaN; NaN is unknown and counts nowhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score


@dataclass(frozen=True)
class Metric:
    """A metric of one label: `function(targets of 0 and 1 [N], probabilities [N])` -> float.

    name: the key in metrics.json of its values per label. column: its heading in tables and figures.
    of_ranks: it depends on the order alone; it then gets logits, since the probabilities of logits above 37 are all 1.
    """

    name: str
    column: str
    function: Callable
    higher_is_better: bool = True
    of_ranks: bool = False

    @property
    def key(self):
        """In metrics.json, metrics.jsonl and TRAIN.BEST_BY: the mean over the labels."""
        return f"mean_{self.name}"

    @property
    def direction(self):
        return "higher is better" if self.higher_is_better else "lower is better"


# To add a metric, write its row: training, --eval and the report all read this table.
METRICS = [
    Metric("auc", "AUROC", roc_auc_score, of_ranks=True),  # Hanley and McNeil 1982
    Metric("average_precision", "AP", average_precision_score, of_ranks=True),
]


def per_label(function, probabilities, targets):
    """`function(target, probability)` of each label that has both classes among its known targets, else None.

    probabilities, targets: [N, L]. With one class there is no AUROC. None becomes null in JSON and a dash in tables; so
    does a value that is not finite.
    """
    values = []
    for probability, target in zip(probabilities.T, targets.T):
        known = ~np.isnan(target)
        both = len(np.unique(target[known])) == 2
        value = float(function(target[known], probability[known])) if both else math.nan
        values.append(value if math.isfinite(value) else None)
    return values


def label_metrics(probabilities, targets, label_names, logits=None, rows=None):
    """{key: mean, name: {label: value}} of each row of METRICS; a mean is over the labels that have a value.

    logits: [N, L] for the metrics of ranks, None where only probabilities are known. rows: those of METRICS to compute.
    """
    found = {}
    for metric in METRICS if rows is None else rows:
        scores = logits if metric.of_ranks and logits is not None else probabilities
        values = per_label(metric.function, scores, targets)
        defined = [v for v in values if v is not None]
        found[metric.key] = float(np.mean(defined)) if defined else None
        found[metric.name] = dict(zip(label_names, values))
    return found
