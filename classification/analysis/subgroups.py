"""Sensitivity, specificity and calibration of each subgroup, at the thresholds of the whole test split."""

from analysis import calibration, groups, thresholds
from analysis.results import count, too_few

RULE = "youden"


def rates_by_group(points, predictions, tables, weights):
    """{variable: {label: {group: {"images", "positives", "sensitivity", "specificity", "slope", "intercept", "ece"}}}}.

    points: the section of operating points (of the validation split); tables: CSV files of groups; weights:
    of statistics.draw. A group with too few patients of a class has only its counts, and "left_out".
    """
    chosen, found = points.get(RULE, {"labels": {}})["labels"], {}
    cluster, _ = predictions.clusters
    for variable, (of, _) in groups.find_groups(predictions, tables).items():
        kept = groups.listed(of)
        if len(kept) < 2:
            continue
        found[variable] = {name: {} for name in predictions.label_names}
        for k, name in enumerate(predictions.label_names):
            cut = chosen.get(name, {}).get("threshold")
            for g in kept:
                p, y = predictions.probabilities[of == g, k], predictions.targets[of == g, k]
                found[variable][name][g] = _measure(p, y, cluster[of == g], cut, weights, predictions.unit)
    return found


def _measure(p, y, cluster, cut, weights, unit):
    """Of one label in one group, [N] each; cut: the threshold, or None."""
    found = count(y, cluster, unit)
    if too_few(found):
        return found | {"left_out": "too few of a class"}
    measured = calibration.measure(p, y, cluster, weights)
    found |= {key: measured.get(key) for key in ("slope", "intercept", "ece")}
    if cut is not None:
        at = thresholds.apply(cut, p, y, cluster)
        found |= {rate: at[rate] for rate in ("sensitivity", "specificity")}
    return found
