"""Evaluations -> one nested dictionary of every number of the report; report.json is it, all else is drawn from it.

A figure is {"value", "low", "high", ...}; None (null) is a figure that does not exist, and "left_out" says why a figure
or a section is not there. Read `collect` first. Further keys of a figure, a label or a section:

    warning, remark   what has to be said of it: "warning" is that it is not to be relied on
    one_sided         True: low (or high) is a one-sided 95% bound, the other end is the scale's
    bias              of an AUPRC: how much it is too high, by the jackknife; its interval is around value - bias
    fitted_on         what was chosen on the validation split: {"patients", "positive_patients", "images", "positives"},
                      None where patients are unknown, and of a threshold the "sensitivity" and "specificity" there
    missed            of a threshold: whether the test split missed the target of its rule; None: the rule has none
    p, p_holm         of a gap between groups (and of a difference): of the largest gap, and adjusted over the labels
    fitted_for        see Evaluation.fitted_for
    chosen            of each label the method that --calibrated takes, see analysis.calibration.fit
"""

from dataclasses import dataclass, replace

import numpy as np

from analysis import calibration, groups, methods, statistics, thresholds
from analysis.evaluation import aligned, check_apart, check_one_configuration
from analysis.metrics import METRICS, label_metrics
from analysis.training_log import read_metrics
from common.errors import UserError
from config import units
from dataset.labels import apply_policy
from dataset.tables import count_groups, count_values

LEVEL = statistics.LEVEL
BANDS = 500  # resamples that draw a curve's band
GRID = np.linspace(0, 1, 101)
RATES_AT = "youden"  # the rule whose thresholds the rates of subgroups are of
WORST = 3  # errors of each kind shown by label
NO_VALIDATION = (
    "no predictions of the validation split (predictions_validate.csv beside predictions.csv, or --validate FILE): "
    "thresholds and scalings are never fitted on the test split"
)
ONE_CLASS = "one class only"
MEASURED = ("auc", "average_precision")  # metrics that Measured has, with intervals
NO_VARIATION = "no test and no interval: the difference is the same in all resamples"
TOO_FEW_TO_FIT = "chosen on fewer than {few} {units} of a class"
ALONE = "one {unit} alone is positive for {labels}: in the mean's interval with the variance of a uniform number, 1/12"
SEPARATED = "the scores separate the classes: a one-sided bound from {pairs} independent pairs of {units}"


@dataclass(frozen=True)
class Options:
    """What the command line decides, see report.py."""

    resamples: int = 2000
    seed: int = 0
    study_by: str = "mean"
    study_views: str = "all"
    sensitivity: float = 0.9
    specificity: float = 0.9
    tables: tuple = ()  # CSV files of subgroups


NO_FIGURE = {"value": None, "low": None, "high": None}


def _figure(value, draws, **more):
    low, high = statistics.interval(draws)
    return {"value": value, "low": low, "high": high, **more}


class Measured:
    """AUROC and average precision of a table of predictions, with what their intervals need.

    auroc, auprc: [L]; auroc_draws: [L, B]; auprc_left_out: [L, G], see statistics.leave_out; placements: of each label.
    """

    def __init__(self, predictions, cluster, weights, rows=slice(None)):
        scores, targets, cluster = predictions.scores[rows], predictions.targets[rows], cluster[rows]
        self.names, self.targets, self.cluster = predictions.label_names, targets, cluster
        self.unit, self.patients = predictions.unit, len(weights)
        whole = statistics.bootstrap(scores, targets, cluster, np.ones((len(weights), 1), np.int32))
        self.auroc, self.auprc = whole[0][:, 0], whole[1][:, 0]
        self.auroc_draws, _ = statistics.bootstrap(scores, targets, cluster, weights)
        _, self.auprc_left_out = statistics.bootstrap(scores, targets, cluster, statistics.leave_out(len(weights)))
        self.placements = [statistics.placements(s, t, cluster) for s, t in zip(scores.T, targets.T)]

    def counts(self, k):
        """Images whose label is known, positive ones, and the patients that have positive or negative ones."""
        return count(self.targets[:, k], self.cluster, self.unit)

    def label(self, k):
        counts, placed = self.counts(k), self.placements[k]
        if placed is None:
            reason = ONE_CLASS if counts["images"] else "not known of any image"
            return {"auroc": NO_FIGURE | {"se": None}, "auprc": dict(NO_FIGURE), **counts, "left_out": reason}
        undefined = int(np.isnan(self.auroc_draws[k]).sum())
        auroc = _figure(float(self.auroc[k]), self.auroc_draws[k], undefined_resamples=undefined)
        found = {"auroc": auroc | {"se": statistics.standard_error(placed)}, "auprc": self._precision([k]), **counts}
        if too_few(counts):
            found["warning"] = f"fewer than {statistics.FEW} {units(self.unit)} of a class: do not rely on the interval"
            found["auprc"] |= {"low": None, "high": None}  # benchmarks/coverage.py: it held the truth in 81%
        if placed.bound:
            low, high = placed.bound
            found["auroc"] |= {"low": low, "high": high, "se": None, "one_sided": True}
            found["remark"] = SEPARATED.format(pairs=placed.pairs, units=units(self.unit))
        elif auroc["low"] is None and undefined < self.auroc_draws.shape[1]:
            found["remark"] = "no interval: the AUROC is the same in all resamples"
        return found

    def _precision(self, k):
        """The figure of the mean average precision of the labels `k`."""
        low, high, bias = statistics.precision_interval(
            self.auprc[k], self.auprc_left_out[k], np.array([self.placements[i].with_positive for i in k])
        )
        return {"value": float(self.auprc[k].mean()), "low": low, "high": high, "bias": bias}

    def labels(self):
        return {name: self.label(k) for k, name in enumerate(self.names)}

    def mean(self, chosen=None):
        """Over the labels that have a value; in a resample, over those that have one there."""
        k = np.flatnonzero(~np.isnan(self.auroc) if chosen is None else chosen)
        if not len(k):
            return dict.fromkeys(("auroc", "auprc"), NO_FIGURE | {"left_out": "no label has both classes"})
        draws, placed = self.auroc_draws[k], [self.placements[i] for i in k]
        auroc = _figure(
            float(self.auroc[k].mean()), statistics.mean_defined(draws),
            undefined_resamples=int(np.isnan(draws).any(0).sum()), se=statistics.mean_standard_error(placed),
        )  # fmt: skip
        found = {"auroc": auroc, "auprc": self._precision(k), "labels": len(k)}
        alone = [self.names[i] for i in k if np.isnan(self.auprc_left_out[i]).any()]
        if found["auprc"]["low"] is None and self.patients > 1:
            found["auprc"]["left_out"] = "no interval: " + (
                f"one {self.unit} alone is positive for each label" if alone else "it is the same in all parts"
            )
        elif alone:
            found["auprc"]["remark"] = ALONE.format(unit=self.unit, labels=", ".join(alone))
        if separated := ", ".join(self.names[i] for i in k if self.placements[i].bound):
            found["remark"] = f"{separated} add no uncertainty to the mean's interval: the scores separate the classes"
        return found


def count(targets, cluster, unit):
    """Of one label, [N] each: images where it is known, positive ones, prevalence, and the patients that have positive
    or negative ones (None where the unit is the image)."""
    known, positive = ~np.isnan(targets), targets == 1
    images, positives = int(known.sum()), int(positive.sum())
    found = {"images": images, "positives": positives, "prevalence": positives / images if images else None}
    for name, rows in (("positive_patients", positive), ("negative_patients", known & ~positive)):
        found[name] = len(np.unique(cluster[rows])) if unit == "patient" else None
    return found


def too_few(counts):
    """Whether a label has fewer than FEW patients (or images, where patients are unknown) of a class."""
    if counts["positive_patients"] is None:
        return min(counts["positives"], counts["images"] - counts["positives"]) < statistics.FEW
    return min(counts["positive_patients"], counts["negative_patients"]) < statistics.FEW


# --------------------------------------------------------------------------------------- sections
def further_metrics(predictions):
    """The rows of METRICS beside those of :class:`Measured`, without intervals."""
    rows, p = [metric for metric in METRICS if metric.name not in MEASURED], predictions
    found = label_metrics(p.probabilities, p.targets, p.label_names, p.logits, rows)
    figures = ({"mean": found[m.key], "labels": found[m.name]} for m in rows)
    return {m.name: {"column": m.column, "direction": m.direction, **own} for m, own in zip(rows, figures)}


def adjust(figures):
    """Puts Holm's adjusted p of each of the figures beside its p."""
    for found, p in zip(figures, statistics.holm([found["p"] for found in figures])):
        found["p_holm"] = p


def difference(measured, theirs, name):
    """The paired difference, by label and of the mean, of two :class:`Measured` of the same images, labels and
    resamples; name: of the other."""
    labels, draws = {}, measured.auroc_draws - theirs.auroc_draws
    for k, label in enumerate(measured.names):
        a, b = measured.placements[k], theirs.placements[k]
        if a is None:
            labels[label] = {"difference": None, "low": None, "high": None, "p": None, "left_out": ONE_CLASS}
            continue
        value = float(measured.auroc[k] - theirs.auroc[k])
        low, high = statistics.interval(draws[k])
        error = statistics.standard_error(a, b)
        labels[label] = {
            "difference": value, "low": low, "high": high, "se": error,
            "p": statistics.normal_p(value, error),
            "other": float(theirs.auroc[k]), "undefined_resamples": int(np.isnan(draws[k]).sum()),
        }  # fmt: skip
        if not error:
            labels[label] |= {"se": None, "p": None, "remark": NO_VARIATION}
    adjust(labels.values())
    mean = {"difference": None, "low": None, "high": None, "p": None, "left_out": "no label has both classes"}
    defined = ~np.isnan(measured.auroc)
    if defined.any():
        draws = np.subtract(*(statistics.mean_defined(m.auroc_draws[defined]) for m in (measured, theirs)))
        low, high = statistics.interval(draws)
        mean = {
            "difference": float(measured.auroc[defined].mean() - theirs.auroc[defined].mean()),
            "low": low, "high": high, "p": None if low is None else statistics.bootstrap_p(draws),
            "other": theirs.mean()["auroc"],
        }  # fmt: skip
    return {"name": name, "primary": "mean AUROC", "mean": mean, "labels": labels}


def between_seeds(evaluations, measured, cluster, weights):
    """Mean and standard deviation between runs, and each run's own mean with its interval."""
    first, *others = evaluations
    check_apart("--seeds-of", evaluations)
    check_one_configuration(first, others)
    runs = [measured, *(Measured(aligned(first.test, e.test), cluster, weights) for e in others)]
    of = list(zip(evaluations, (run.mean()["auroc"] for run in runs)))

    def spread(values):
        values = [v for v in values if v is not None and not np.isnan(v)]
        if not values:
            return {"mean": None, "sd": None, "left_out": ONE_CLASS}
        return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}

    return {
        "runs": [{"name": e.name, "given": e.given, "seed": e.config.get("SEED"), "auroc": mean} for e, mean in of],
        "remark": None if first.config else "the tables do not record that they are of one configuration",
        "mean": spread([mean["value"] for _, mean in of]),
        "labels": {n: spread([run.auroc[k] for run in runs]) for k, n in enumerate(measured.names)},
    }


def studies(predictions, options):
    """The figures by study."""
    found = {"by": options.study_by, "views": options.study_views}
    try:
        table = predictions.by_study(options.study_by, options.study_views == "frontal")
    except UserError as error:
        return found | {"left_out": str(error)}
    cluster, patients = table.clusters
    measured = Measured(table, cluster, statistics.draw(patients, options.resamples, options.seed))
    return found | {"studies": len(table), "mean": measured.mean(), "labels": measured.labels()}


def by_group(predictions, cluster, weights, options):
    """Subgroups of every variable: each group's figures, and the largest gap between two."""
    return {
        name: _one_variable(predictions, cluster, weights, of, reason)
        if groups.listed(of)
        else {"left_out": reason if of is None else "not known of any image"}
        for name, (of, reason) in groups.find_groups(predictions, options.tables).items()
    }


def _one_variable(predictions, cluster, weights, of, note):
    parts = {g: Measured(predictions, cluster, weights, of == g) for g in groups.listed(of)}
    names, unit = predictions.label_names, predictions.unit
    enough = np.array([[not too_few(m.counts(k)) for k in range(len(names))] for m in parts.values()])
    # Means of groups compare only over the same labels: those that every group judges which judges most of them.
    most = enough.sum(1) > enough.any(0).sum() / 2
    common = enough[most].all(0) if most.any() else np.zeros(len(names), bool)
    section = {"groups": {}, "unknown": int((of == "").sum()), "mean_of": [n for n, c in zip(names, common) if c]}
    if note:
        section["remark"] = note
    for g, m, able in zip(parts, parts.values(), most):
        labels, mean = m.labels(), m.mean(common if able else np.zeros(len(names), bool))
        poor = [n for n, found in labels.items() if "warning" in found or "left_out" in found]
        if not able:
            for figure in mean.values():
                figure["left_out"] = f"judges {len(names) - len(poor)} of {len(names)} labels"
        patients = len(np.unique(m.cluster)) if unit == "patient" else None
        group = {"images": int((of == g).sum()), "patients": patients, "mean": mean, "labels": labels}
        if poor:
            group["warning"] = f"too few {units(unit)} of a class (under {statistics.FEW}) to judge: {', '.join(poor)}"
        section["groups"][g] = group

    def gap(judged, k):
        """Of the mean over the labels `k`, between the groups that can judge it."""
        able = {g: m for (g, m), fine in zip(parts.items(), judged) if fine}
        if len(able) < 2:
            return NO_FIGURE | {"p": None, "left_out": "fewer than two groups that can be judged"}
        values = np.array([m.auroc[k].mean() for m in able.values()])
        draws = np.array([statistics.mean_defined(m.auroc_draws[k]) for m in able.values()])
        p, reach = statistics.largest_gap(values, draws)
        best, worst, value = int(values.argmax()), int(values.argmin()), float(np.ptp(values))
        low, high = (None, None) if reach is None else (value - reach, value + reach)
        return {"value": value, "low": low, "high": high, "p": p, "best": list(able)[best], "worst": list(able)[worst]}

    section["gap"] = {
        "mean": gap(most & common.any(), common),
        "labels": {n: gap(enough[:, k], [k]) for k, n in enumerate(names)},
    }
    adjust(section["gap"]["labels"].values())
    return section


def operating_points(evaluation, cluster, options):
    """Thresholds of every rule from the validation split, and their counts and rates on the test split."""
    if evaluation.validate is None:
        return {"left_out": NO_VALIDATION}
    test, held_out = evaluation.test, evaluation.validate
    held_cluster, _ = held_out.clusters
    texts = {rule: text.format(**vars(options)) for rule, text in thresholds.RULES.items()}
    found = {rule: {"rule": text, "target": vars(options).get(rule), "labels": {}} for rule, text in texts.items()}
    for k, name in enumerate(test.label_names):
        p, y = held_out.probabilities[:, k], held_out.targets[:, k]
        fitted_on = _fitted_on(y, held_cluster, held_out.unit)
        for rule, threshold in thresholds.choose(p, y, options.sensitivity, options.specificity).items():
            if threshold is None:
                one_class = len(set(y) & {0.0, 1.0}) < 2
                reason = "one class only in the validation split" if one_class else "no threshold reaches it"
                found[rule]["labels"][name] = {"threshold": None, "fitted_on": fitted_on, "left_out": reason}
                continue
            there = thresholds.apply(threshold, p, y, held_cluster)
            reached = {rate: there[rate]["value"] for rate in ("sensitivity", "specificity")}
            point = thresholds.apply(threshold, test.probabilities[:, k], test.targets[:, k], cluster)
            target, value = found[rule]["target"], point.get(rule, {}).get("value")
            point |= {"fitted_on": fitted_on | reached, "missed": None if None in (target, value) else value < target}
            if too_few(count(y, held_cluster, held_out.unit)):
                point["warning"] = TOO_FEW_TO_FIT.format(few=statistics.FEW, units=units(held_out.unit))
            found[rule]["labels"][name] = point
    return found


def by_frequency(evaluation, measured, points):
    """The labels in the groups of the data (head, medium, tail) by their share of the training images, with the means
    of each group and of all; None where the data has no such groups. points: the section of operating points.

    A group: "least", the smallest share in it, "labels", "mean" as of all labels, "f1". f1: at the threshold 0.5, and
    in "chosen" at that of the largest F1 in validation; of a group the means over the labels that have one.
    """
    least, test = evaluation.metrics.get("label_groups"), evaluation.test
    if not least:
        return None
    train = evaluation.metrics.get("cohort", {}).get("splits", {}).get("train")
    if not train:
        return {"left_out": "the evaluation does not record the train split, by which labels are frequent or rare"}
    chosen, labels = points.get("f1", {"labels": {}})["labels"], {}
    for k, name in enumerate(test.label_names):
        share = train["labels"][name]["positives"] / train["images"]
        group = next((g for g, low in least.items() if share >= low), list(least)[-1])
        half = thresholds.apply(0.5, test.probabilities[:, k], test.targets[:, k], measured.cluster)
        defined = not np.isnan(measured.auprc[k])
        f1 = {"half": half, "chosen": chosen.get(name, {})}
        f1 = {key: thresholds.f1(at) if defined and "tp" in at else None for key, at in f1.items()}
        labels[name] = {"share": share, "group": group, "f1": f1}

    def means(names):
        k = [i for i, n in enumerate(test.label_names) if n in names and not np.isnan(measured.auprc[i])]
        f1 = {key: [v for n in names if (v := labels[n]["f1"][key]) is not None] for key in ("half", "chosen")}
        return {"mean": measured.mean(np.isin(np.arange(len(test.label_names)), k)),
                "f1": {key: float(np.mean(values)) if values else None for key, values in f1.items()}}  # fmt: skip

    in_group = {g: [n for n, found in labels.items() if found["group"] == g] for g in least}
    groups = {g: {"least": least[g], "labels": names, **means(names)} for g, names in in_group.items()}
    return {"groups": groups, "labels": labels, "all": means(list(labels))}


def rates_by_group(points, predictions, tables, weights):
    """{variable: {label: {group: {"images", "positives", "sensitivity", "specificity", "slope", "intercept", "ece"}}}}.

    points: the section of operating points (of the validation split); tables: CSV files of groups; weights:
    of statistics.draw. A group with too few patients of a class has only its counts, and "left_out".
    """
    chosen, found = points.get(RATES_AT, {"labels": {}})["labels"], {}
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
                found[variable][name][g] = _rates(p, y, cluster[of == g], cut, weights, predictions.unit)
    return found


def _rates(p, y, cluster, cut, weights, unit):
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


def _fitted_on(targets, cluster, unit):
    """The numbers of a label in the validation split, [N] each."""
    counts = count(targets, cluster, unit)
    patients = len(np.unique(cluster[~np.isnan(targets)])) if unit == "patient" else None
    return {"patients": patients, **{key: counts[key] for key in ("positive_patients", "images", "positives")}}


def calibrations(evaluation, cluster, weights):
    """(section of the report, content of calibration.json or None)."""
    test, held_out = evaluation.test, evaluation.validate
    names = test.label_names

    def stage(probabilities):
        by_label = zip(names, probabilities.T, test.targets.T)
        labels = {n: calibration.measure(p, y, cluster, weights) for n, p, y in by_label if not np.isnan(p[0])}
        not_fitted = {"left_out": "not fitted, see the choice of --calibrated"}
        labels = {n: labels.get(n, not_fitted) for n in names}
        measured = [(found["brier"]["value"], found["ece"]) for found in labels.values() if "ece" in found]
        brier, ece = (float(np.mean(values)) for values in zip(*measured)) if measured else (None, None)
        return {"labels": labels, "mean": {"brier": brier, "ece": ece, "labels": len(measured)}}

    def scaled(methods):
        """The test split's probabilities by one method a label."""
        by_label = zip(methods, names, test.probabilities.T)
        return stage(np.stack([calibration.scale(scaling, method, n, p) for method, n, p in by_label], 1))

    section = {"before": stage(test.probabilities)}
    if held_out is None:
        return section | {"left_out": NO_VALIDATION}, None
    held_cluster, _ = held_out.clusters
    scaling = calibration.fit(held_out.probabilities, held_out.targets, held_cluster, names, held_out.unit)
    section["temperature"] = {"left_out": "the validation split cannot fit it"}
    if scaling["temperature"] is not None:
        section["temperature"] = scaled(["temperature"] * len(names))
    section["platt"] = scaled(["platt"] * len(names))
    section["calibrated"] = scaled([scaling["chosen"][n]["method"] for n in names])
    fitted = {
        "fitted_on": held_out.path.name,
        "images": len(held_out),
        "labels": {n: _fitted_on(y, held_cluster, held_out.unit) for n, y in zip(names, held_out.targets.T)},
        "label_names": list(names),
        "checkpoint_sha256": evaluation.validate_of,
        "fitted_for": evaluation.fitted_for,
        **scaling,
    }
    return section | {"fitted": fitted}, fitted


def other_policies(predictions, cluster, weights):
    """The same test under other readings of uncertain and blank labels, as far as the label values allow it."""
    raw = predictions.labels
    if raw is None:
        return {"left_out": "the predictions do not keep the labels as they are in the label file (<label>_label)"}
    uncertain = ("zeros", "ones", "ignore") if (raw == -1).any() else ("zeros",)
    missing = ("zeros", "ignore") if np.isnan(raw).any() else ("zeros",)
    if len(uncertain) * len(missing) == 1:
        return {"left_out": "every label is 1 or 0: no policy changes anything"}
    found = []
    for u in uncertain:
        for m in missing:
            targets = apply_policy(raw, predictions.label_names, uncertain=u, missing=m, soft=False).astype(float)
            same = bool(((targets == predictions.targets) | (np.isnan(targets) & np.isnan(predictions.targets))).all())
            tried = Measured(replace(predictions, targets=targets), cluster, weights)
            policy = {"uncertain": u, "missing": m, "as_used": same}
            found.append(policy | {"mean": tried.mean(), "labels": tried.labels()})
    return {"policies": found}


def curves(predictions, cluster, weights):
    """ROC and precision-recall of every label on a grid, with the band of the first BANDS resamples."""
    found = {"grid": GRID.tolist(), "resamples": min(BANDS, weights.shape[1]), "labels": {}}
    ones = np.ones((len(weights), 1), int)
    for k, name in enumerate(predictions.label_names):
        ranking = statistics.Ranking(predictions.scores[:, k], predictions.targets[:, k], cluster)
        if not ranking.both:
            continue
        whole, drawn = ranking.curves(ones, GRID), ranking.curves(weights[:, :BANDS], GRID)
        found["labels"][name] = {}
        for key, value, draws in zip(("roc", "precision_recall"), whole, drawn):
            draws = draws[:, ~np.isnan(draws[0])]
            low, high = np.percentile(draws, [2.5, 97.5], axis=1) if draws.shape[1] else (value[:, 0], value[:, 0])
            lines = {"value": value[:, 0], "low": low, "high": high}
            found["labels"][name][key] = {line: [round(float(v), 5) for v in values] for line, values in lines.items()}
    return found


def worst_errors(predictions):
    """By label the positives of lowest and the negatives of highest probability, with their ids."""
    found, ids = {}, predictions.ids
    for k, name in enumerate(predictions.label_names):
        p, y = predictions.probabilities[:, k], predictions.targets[:, k]
        scores = predictions.scores[:, k]
        found[name] = {}
        for kind, truth, sign in (("missed", 1, 1), ("false_alarms", 0, -1)):
            rows = np.flatnonzero(y == truth)
            rows = rows[np.argsort(sign * scores[rows], kind="stable")][:WORST]
            found[name][kind] = [
                {"image": predictions.image_ids.iloc[r], "probability": float(p[r]), "row": int(r)}
                | {c: ids[c].iloc[r] for c in ("study_id", "subject_id", "view") if c in ids}
                for r in rows
            ]
    return found


def cohort(evaluation, options):
    """Flow and cohort: counts, views, sex, age bands and prevalence by split, and what was left out."""
    recorded = evaluation.metrics.get("cohort", {})
    splits = {name: dict(found) for name, found in recorded.get("splits", {}).items()}
    for split, predictions in (("validate", evaluation.validate), ("test", evaluation.test)):
        if predictions is None:
            continue
        found = {"images": len(predictions)}
        for name, column in (("studies", "study_id"), ("patients", "subject_id")):
            found[name] = int(predictions.ids[column].nunique()) if column in predictions.ids else None
        raw = [None] * len(predictions.label_names) if predictions.labels is None else predictions.labels.T
        of_label = zip(predictions.label_names, predictions.targets.T, raw)
        found["labels"] = {name: count_values(targets, values) for name, targets, values in of_label}
        variables = groups.find_groups(predictions, options.tables, required=False)
        found["groups"] = {name: count_groups(of) for name, (of, _) in variables.items() if of is not None}
        splits[split] = splits.get(split, {}) | found
    found = {"splits": {s: splits[s] for s in ("train", "validate", "test") if s in splits}}
    found["left_out"] = recorded.get("left_out", {})
    found["skipped"] = evaluation.metrics.get("skipped", 0)
    if not recorded:
        found["note"] = "the evaluation does not record the train split, nor what was left out"
    return found


def training(evaluation):
    """The epochs of the training run."""
    path = evaluation.epochs_file
    if path is None:
        return {"left_out": "no metrics.jsonl in the evaluation or beside its checkpoint"}
    epochs = read_metrics(path)
    keys = ["epoch", "train_loss", "val_loss", *(metric.key for metric in METRICS), "lr"]
    best = [key for key in epochs[-1] if key.startswith("best_")] if epochs else []
    return {"epochs": [{k: e[k] for k in [*keys, *best] if k in e} for e in epochs]}


def cooccurrence(predictions):
    """How many images have both labels: [L, L], the diagonal is each label's own."""
    positive = (predictions.targets == 1).astype(int)
    return {"labels": list(predictions.label_names), "counts": (positive.T @ positive).tolist()}


def about(evaluation):
    """What was evaluated."""
    m, config = evaluation.metrics, evaluation.config
    dataset = m.get("dataset") or config.get("DATA", {}).get("DATASET")
    labelers = config.get("DATA", {}) if dataset == "mimic_cxr" else {}  # the others have one label file each
    trained, tested = ((m.get("domain") or {}).get(key) for key in ("trained", "tested"))
    return {
        "name": evaluation.name,
        "given": evaluation.given,
        "dataset": dataset,
        "primary": {"average_precision": "auprc"}.get(m.get("primary_metric"), "auroc"),
        "tested_on": m.get("tested_on", [dataset]),
        "trained_on": m.get("trained_on", []),
        "model": config.get("MODEL", {}).get("NAME") or None,
        "architecture": config.get("MODEL", {}).get("TYPE") or None,
        "image_size": config.get("DATA", {}).get("IMG_SIZE"),
        "labeler": labelers.get("LABELER"),
        "test_labeler": labelers.get("TEST_LABELER"),
        "seed": config.get("SEED"),
        "checkpoint": m.get("checkpoint"),
        "checkpoint_sha256": m.get("checkpoint_sha256"),
        "domain": f"{tested or 'not known'}, trained on {trained}" if trained and trained != tested else tested,
        "warnings": m.get("warnings", []),
        "ensemble": m.get("ensemble"),
        "loss": m.get("loss"),
        **{key: m[key] for key in ("parameters", "gmacs", "images_per_s") if key in m},
    }


def drawn_from(predictions, patients, options):
    """What the bootstrap draws: units, how many, how often."""
    found = {
        "unit": predictions.unit, "units": patients, "row": predictions.row, "images": len(predictions),
        "resamples": options.resamples, "seed": options.seed, "level": LEVEL,
    }  # fmt: skip
    if patients < 2:
        found["warning"] = f"one {predictions.unit} only: there is no interval and no standard error"
    return found


def collect(evaluation, options, against=(), seeds=(), stated=None):
    """The report of an :class:`Evaluation` as one dictionary, and what calibration.json holds (or None).

    against, seeds: further :class:`Evaluation`, see :func:`difference` and :func:`between_seeds`. stated: see
    analysis.card.read_about.

    UserError: a comparison with other images, labels or targets; a table of groups that does not fit.
    """
    test = evaluation.test
    cluster, patients = test.clusters
    weights = statistics.draw(patients, options.resamples, options.seed)
    measured = Measured(test, cluster, weights)
    report = {
        "about": about(evaluation),
        "policy": evaluation.policy,
        "label_mapping": evaluation.metrics.get("label_mapping", {}),
        "bootstrap": drawn_from(test, patients, options),
        "label_names": list(test.label_names),
        "fitted_for": evaluation.fitted_for,
        "mean": measured.mean(),
        "labels": measured.labels(),
        "metrics": further_metrics(test),
        "study": studies(test, options),
        "groups": by_group(test, cluster, weights, options),
        "thresholds": operating_points(evaluation, cluster, options),
    }  # fmt: skip
    report["frequency"] = by_frequency(evaluation, measured, report["thresholds"])
    if against:
        check_apart("--against", [evaluation, *against])
        others = [Measured(aligned(test, e.test), cluster, weights) for e in against]
        report["against"] = {e.given: difference(measured, m, e.name) for e, m in zip(against, others)}
    if seeds:
        report["seeds"] = between_seeds([evaluation, *seeds], measured, cluster, weights)
    report["calibration"], fitted = calibrations(evaluation, cluster, weights)
    report["sensitivity"] = other_policies(test, cluster, weights)
    report["cohort"] = cohort(evaluation, options)
    report["training"] = training(evaluation)
    report["cooccurrence"] = cooccurrence(test)
    report["errors"] = worst_errors(test)
    report["curves"] = curves(test, cluster, weights)
    report["methods"] = methods.collect(evaluation, report["about"], report["training"].get("epochs", []))
    report["stated"] = stated or {}
    report["decisions"] = calibration.decision_curves(test, fitted)
    report["rates"] = rates_by_group(report["thresholds"], test, options.tables, weights)
    return report, fitted
