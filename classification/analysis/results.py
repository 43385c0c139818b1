"""Evaluations -> one nested dictionary of every number of the report; report.json is it, all else is drawn from it.

A figure is {"value", "low", "high", ...}; None (null) is a figure that does not exist, and "left_out" says why a figure
or a section is not there. Read `collect` first.
"""

from dataclasses import dataclass

import numpy as np

from analysis import calibration, groups, statistics, thresholds
from analysis.evaluation import aligned, check_one_configuration
from analysis.metrics import METRICS, label_metrics
from analysis.training_log import read_metrics
from common.errors import UserError
from dataset.labels import apply_policy

LEVEL = 0.95
BANDS = 500  # resamples that draw a curve's band
GRID = np.linspace(0, 1, 101)
WORST = 3  # errors of each kind shown by label
NO_VALIDATION = (
    "no predictions of the validation split (predictions_validate.csv beside predictions.csv, or --validate FILE): "
    "thresholds and scalings are never fitted on the test split"
)
ONE_CLASS = "one class only"
MEASURED = ("auc", "average_precision")  # metrics that Measured has, with intervals


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


def interval(draws):
    return statistics.interval(draws, LEVEL)


def _figure(value, draws, **more):
    low, high = interval(draws) if value is not None else (None, None)
    return {"value": value, "low": low, "high": high, **more}


def _or_none(value):
    return None if np.isnan(value) else float(value)


class Measured:
    """AUROC and average precision of a table of predictions, with their resamples.

    auroc, auprc: [L]; auroc_draws, auprc_draws: [L, B]; placements: of each label.
    """

    def __init__(self, predictions, cluster, weights, rows=slice(None)):
        scores, targets, cluster = predictions.probabilities[rows], predictions.targets[rows], cluster[rows]
        self.names, self.targets, self.cluster = predictions.label_names, targets, cluster
        self.unit, self.patients = predictions.unit, len(weights)
        whole = statistics.bootstrap(scores, targets, cluster, np.ones((len(weights), 1), np.int32))
        self.auroc, self.auprc = whole[0][:, 0], whole[1][:, 0]
        self.auroc_draws, self.auprc_draws = statistics.bootstrap(scores, targets, cluster, weights)
        self.placements = [statistics.placements(s, t, cluster) for s, t in zip(scores.T, targets.T)]

    def counts(self, k):
        """Images whose label is known, positive ones, and the patients that have positive or negative ones."""
        known, positive = ~np.isnan(self.targets[:, k]), self.targets[:, k] == 1
        images, positives = int(known.sum()), int(positive.sum())
        found = {"images": images, "positives": positives, "prevalence": positives / images if images else None}
        by_patient = self.unit == "patient"
        for name, rows in (("positive_patients", positive), ("negative_patients", known & ~positive)):
            found[name] = len(np.unique(self.cluster[rows])) if by_patient else None
        return found

    def label(self, k):
        counts = self.counts(k)
        found = {"auroc": {}, "auprc": {}, **counts}
        for key, value, draws in (
            ("auroc", _or_none(self.auroc[k]), self.auroc_draws[k]),
            ("auprc", _or_none(self.auprc[k]), self.auprc_draws[k]),
        ):
            undefined = None if value is None else int(np.isnan(draws).sum())
            found[key] = _figure(value, draws, undefined_resamples=undefined)
        found["auroc"]["se"] = statistics.standard_error(self.placements[k])
        if found["auroc"]["value"] is None:
            found["left_out"] = ONE_CLASS if counts["images"] else "not known of any image"
        elif too_few(counts):
            found["warning"] = f"fewer than {statistics.FEW} {self.unit}s of a class: do not rely on the interval"
        return found

    def labels(self):
        return {name: self.label(k) for k, name in enumerate(self.names)}

    def mean(self, chosen=None):
        """Over the labels that have a value; in a resample, over those that have one there."""
        k = np.flatnonzero(~np.isnan(self.auroc) if chosen is None else chosen)
        if not len(k):
            reason = {"left_out": "no label has both classes"}
            return {key: {"value": None, "low": None, "high": None, **reason} for key in ("auroc", "auprc")}
        found = {}
        for key, values, draws in (
            ("auroc", self.auroc[k], self.auroc_draws[k]),
            ("auprc", self.auprc[k], self.auprc_draws[k]),
        ):
            undefined = int(np.isnan(draws).any(0).sum())
            found[key] = _figure(float(values.mean()), statistics.mean_defined(draws), undefined_resamples=undefined)
        found["auroc"]["se"] = statistics.mean_standard_error([self.placements[i] for i in k])
        return found | {"labels": len(k)}


def too_few(counts):
    """Whether a label has fewer than FEW patients (or images, where patients are unknown) of a class."""
    if counts["positive_patients"] is None:
        return min(counts["positives"], counts["images"] - counts["positives"]) < statistics.FEW
    return min(counts["positive_patients"], counts["negative_patients"]) < statistics.FEW


# --------------------------------------------------------------------------------------- sections
def further_metrics(predictions):
    """The rows of METRICS beside those of :class:`Measured`, without intervals."""
    found = label_metrics(predictions.probabilities, predictions.targets, predictions.label_names)
    return {
        metric.name: {
            "column": metric.column, "direction": metric.direction, "mean": found[metric.key],
            "labels": found[metric.name],
        }
        for metric in METRICS
        if metric.name not in MEASURED
    }  # fmt: skip


def compare(measured, other, predictions, cluster, weights):
    """The paired difference, this minus `other` (an :class:`Evaluation`), by label and of the mean."""
    return difference(measured, Measured(aligned(predictions, other.test), cluster, weights), other.name)


def difference(measured, theirs, name):
    """The same of two :class:`Measured` of the same images, labels and resamples; name: of the other."""
    labels, draws = {}, measured.auroc_draws - theirs.auroc_draws
    for k, label in enumerate(measured.names):
        a, b = measured.placements[k], theirs.placements[k]
        if a is None:
            labels[label] = {"difference": None, "low": None, "high": None, "p": None, "left_out": ONE_CLASS}
            continue
        value = float(measured.auroc[k] - theirs.auroc[k])
        low, high = interval(draws[k])
        error = statistics.standard_error(a, b)
        labels[label] = {
            "difference": value, "low": low, "high": high, "se": error,
            "p": statistics.normal_p(value, error),
            "other": float(theirs.auroc[k]), "undefined_resamples": int(np.isnan(draws[k]).sum()),
        }  # fmt: skip
    for found, p in zip(labels.values(), statistics.holm([found["p"] for found in labels.values()])):
        found["p_holm"] = p
    mean = {"difference": None, "low": None, "high": None, "p": None, "left_out": "no label has both classes"}
    defined = ~np.isnan(measured.auroc)
    if defined.any():
        draws = statistics.mean_defined(measured.auroc_draws[defined]) - statistics.mean_defined(
            theirs.auroc_draws[defined]
        )
        low, high = interval(draws)
        mean = {
            "difference": float(measured.auroc[defined].mean() - theirs.auroc[defined].mean()),
            "low": low, "high": high, "p": statistics.bootstrap_p(draws), "other": theirs.mean()["auroc"],
        }  # fmt: skip
    return {"name": name, "primary": "mean AUROC", "mean": mean, "labels": labels}


def between_seeds(evaluations, measured, cluster, weights):
    """Mean and standard deviation between runs, and each run's own mean with its interval."""
    first, *others = evaluations
    check_one_configuration(first, others)
    runs = [measured, *(Measured(aligned(first.test, e.test), cluster, weights) for e in others)]

    def spread(values):
        values = [v for v in values if v is not None]
        if not values:
            return {"mean": None, "sd": None, "left_out": ONE_CLASS}
        return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}

    means = [run.mean()["auroc"] for run in runs]
    return {
        "runs": [
            {"name": e.name, "given": e.given, "seed": e.config.get("SEED"), "auroc": m}
            for e, m in zip(evaluations, means)
        ],
        "mean": spread([m["value"] for m in means]),
        "labels": {n: spread([_or_none(r.auroc[k]) for r in runs]) for k, n in enumerate(measured.names)},
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
    found = {}
    for name, (of, reason) in groups.find_groups(predictions, options.tables).items():
        if of is None:
            found[name] = {"left_out": reason}
            continue
        kept = [g for g in sorted(set(of)) if g]
        if not kept:
            found[name] = {"left_out": "not known of any image"}
            continue
        found[name] = _one_variable(predictions, cluster, weights, of, kept)
    return found


def _one_variable(predictions, cluster, weights, of, kept):
    parts = {g: Measured(predictions, cluster, weights, of == g) for g in kept}
    names = predictions.label_names
    enough = np.array([[not too_few(m.counts(k)) for k in range(len(names))] for m in parts.values()])
    # Means of groups compare only over the same labels: those that every group with any can judge.
    common = enough[enough.any(1)].all(0)
    section = {"groups": {}, "unknown": int((of == "").sum()), "mean_of": [n for n, c in zip(names, common) if c]}
    for g, m in parts.items():
        labels = m.labels()
        section["groups"][g] = {
            "images": int((of == g).sum()),
            "patients": len(np.unique(m.cluster)) if m.unit == "patient" else None,
            "mean": m.mean(
                common if common.any() and not np.isnan(m.auroc[common]).any() else np.zeros(len(names), bool)
            ),
            "labels": labels,
        }
        poor = [n for n, found in labels.items() if "warning" in found or "left_out" in found]
        if poor:
            section["groups"][g]["warning"] = (
                f"too few {m.unit}s of a class (under {statistics.FEW}) to judge: {', '.join(poor)}"
            )

    def gap(judged, value, draws):
        candidates = {g: value(m) for (g, m), fine in zip(parts.items(), judged) if fine}
        if len(candidates) < 2:
            return {"value": None, "low": None, "high": None, "left_out": "fewer than two groups that can be judged"}
        best, worst = max(candidates, key=candidates.get), min(candidates, key=candidates.get)
        return _figure(
            candidates[best] - candidates[worst], draws(parts[best]) - draws(parts[worst]), best=best, worst=worst
        )

    section["gap"] = {
        "mean": gap(
            enough[:, common].all(1) & common.any(),
            lambda m: float(m.auroc[common].mean()),
            lambda m: statistics.mean_defined(m.auroc_draws[common]),
        ),
        "labels": {
            n: gap(enough[:, k], lambda m: float(m.auroc[k]), lambda m: m.auroc_draws[k]) for k, n in enumerate(names)
        },
    }
    return section


def operating_points(evaluation, cluster, weights, options):
    """Thresholds of every rule from the validation split, and their counts and rates on the test split."""
    if evaluation.validate is None:
        return {"left_out": NO_VALIDATION}
    test, held_out = evaluation.test, evaluation.validate
    texts = {rule: text.format(**vars(options)) for rule, text in thresholds.RULES.items()}
    found = {rule: {"rule": text, "labels": {}} for rule, text in texts.items()}
    for k, name in enumerate(test.label_names):
        chosen = thresholds.choose(
            held_out.probabilities[:, k], held_out.targets[:, k], options.sensitivity, options.specificity
        )
        for rule, threshold in chosen.items():
            if threshold is None:
                one_class = len(set(held_out.targets[:, k]) & {0.0, 1.0}) < 2
                reason = "one class only in the validation split" if one_class else "no threshold reaches it"
                found[rule]["labels"][name] = {"threshold": None, "left_out": reason}
            else:
                found[rule]["labels"][name] = thresholds.apply(
                    threshold, test.probabilities[:, k], test.targets[:, k], cluster, weights, interval
                )
    return found


def calibrations(evaluation, cluster, weights):
    """(section of the report, content of calibration.json or None)."""
    test, held_out = evaluation.test, evaluation.validate
    names = test.label_names

    def stage(probabilities):
        labels = {
            n: {"left_out": "the validation split cannot fit it"}
            if np.isnan(probabilities[0, k])
            else calibration.measure(probabilities[:, k], test.targets[:, k], cluster, weights, interval)
            for k, n in enumerate(names)
        }
        measured = [found for found in labels.values() if "ece" in found]
        mean = {
            "brier": float(np.mean([found["brier"]["value"] for found in measured])) if measured else None,
            "ece": float(np.mean([found["ece"] for found in measured])) if measured else None,
            "labels": len(measured),
        }
        return {"labels": labels, "mean": mean}

    section = {"before": stage(test.probabilities)}
    if held_out is None:
        return section | {"left_out": NO_VALIDATION}, None
    temperature = calibration.fit_temperature(held_out.probabilities, held_out.targets)
    platt = {
        n: calibration.fit_platt(held_out.probabilities[:, k], held_out.targets[:, k]) for k, n in enumerate(names)
    }
    if temperature is not None:
        section["temperature"] = stage(calibration.apply_temperature(test.probabilities, temperature))
    else:
        section["temperature"] = {"left_out": "the validation split cannot fit it"}
    scaled = [
        np.full(len(test), np.nan) if platt[n] is None else calibration.apply_platt(test.probabilities[:, k], platt[n])
        for k, n in enumerate(names)
    ]
    section["platt"] = stage(np.stack(scaled, 1))
    fitted = {
        "fitted_on": held_out.path.name,
        "images": len(held_out),
        "label_names": list(names),
        "checkpoint_sha256": evaluation.validate_of,
        "fitted_for": evaluation.fitted_for,
        "temperature": temperature,
        "platt": platt,
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
            tried = Measured(
                type(predictions)(predictions.path, predictions.label_names, predictions.ids, targets,
                                  predictions.probabilities), cluster, weights,
            )  # fmt: skip
            found.append(
                {"uncertain": u, "missing": m, "as_used": same, "mean": tried.mean(), "labels": tried.labels()}
            )
    return {"policies": found}


def curves(predictions, cluster, weights):
    """ROC and precision-recall of every label on a grid, with the band of the first BANDS resamples."""
    found, ones = (
        {"grid": GRID.tolist(), "resamples": min(BANDS, weights.shape[1]), "labels": {}},
        np.ones((len(weights), 1), int),
    )
    for k, name in enumerate(predictions.label_names):
        ranking = statistics.Ranking(predictions.probabilities[:, k], predictions.targets[:, k], cluster)
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
        found[name] = {}
        for kind, rows, sign in (
            ("missed", np.flatnonzero(y == 1), 1),
            ("false_alarms", np.flatnonzero(y == 0), -1),
        ):
            rows = rows[np.argsort(sign * p[rows], kind="stable")][:WORST]
            found[name][kind] = [
                {"image": predictions.image_ids.iloc[r], "probability": float(p[r]), "row": int(r)}
                | {c: ids[c].iloc[r] for c in ("study_id", "subject_id", "view") if c in ids}
                for r in rows
            ]
    return found


def _counted(known, positives):
    return {"known": known, "positives": positives, "prevalence": positives / known if known else None}


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
        known, positive = ~np.isnan(predictions.targets), predictions.targets == 1
        found["labels"] = {
            n: _counted(int(known[:, k].sum()), int(positive[:, k].sum()))
            for k, n in enumerate(predictions.label_names)
        }
        found["groups"] = {
            name: {g: {"images": int((of == g).sum()), "share": float((of == g).mean())} for g in sorted(set(of))}
            for name, (of, _) in groups.find_groups(predictions, options.tables, required=False).items()
            if of is not None
        }
        splits[split] = splits.get(split, {}) | found
    order = [s for s in ("train", "validate", "test") if s in splits]
    found = {"splits": {s: splits[s] for s in order}}
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


def _domain(recorded):
    """'pictures', or 'dicom window, trained on pictures'."""
    trained, tested = recorded.get("trained"), recorded.get("tested")
    return tested if not trained or trained == tested else f"{tested or 'not known'}, trained on {trained}"


def about(evaluation):
    """What was evaluated."""
    m, config = evaluation.metrics, evaluation.config
    dataset = m.get("dataset") or config.get("DATA", {}).get("DATASET")
    labelers = config.get("DATA", {}) if dataset == "mimic_cxr" else {}  # the others have one label file each
    return {
        "name": evaluation.name,
        "given": evaluation.given,
        "dataset": dataset,
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
        "domain": _domain(m.get("domain") or {}),
        "warnings": m.get("warnings", []),
        "ensemble": m.get("ensemble"),
        "loss": m.get("loss"),
        **{key: m[key] for key in ("parameters", "gmacs", "images_per_s") if key in m},
    }


def drawn_from(predictions, patients, options):
    """What the bootstrap draws: units, how many, how often."""
    found = {
        "unit": predictions.unit, "units": patients, "images": len(predictions),
        "resamples": options.resamples, "seed": options.seed, "level": LEVEL,
    }  # fmt: skip
    if patients < 2:
        found["warning"] = f"one {predictions.unit} only: there is no interval and no standard error"
    return found


def collect(evaluation, options, against=(), seeds=()):
    """The report of an :class:`Evaluation` as one dictionary, and what calibration.json holds (or None).

    against, seeds: further :class:`Evaluation`, see :func:`compare` and :func:`between_seeds`.

    Raises:
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
        "thresholds": operating_points(evaluation, cluster, weights, options),
    }  # fmt: skip
    if against:
        report["against"] = {e.given: compare(measured, e, test, cluster, weights) for e in against}
    if seeds:
        report["seeds"] = between_seeds([evaluation, *seeds], measured, cluster, weights)
    report["calibration"], fitted = calibrations(evaluation, cluster, weights)
    report["sensitivity"] = other_policies(test, cluster, weights)
    report["cohort"] = cohort(evaluation, options)
    report["training"] = training(evaluation)
    report["cooccurrence"] = cooccurrence(test)
    report["errors"] = worst_errors(test)
    report["curves"] = curves(test, cluster, weights)
    return report, fitted
