"""How far probabilities can be taken at their word, and two ways to mend them: temperature and Platt scaling.

Both are fitted on the validation split and act on z = logit(probability) of a label:

    temperature   sigmoid(z / temperature), one temperature for all labels
    Platt         sigmoid(slope * z + intercept), a pair for each label

`calibration.json`, for predict.py --calibrated, holds {"fitted_on": file, "images": N, "label_names": [...],
"fitted_for": see Evaluation.fitted_for, "checkpoint_sha256": text or null} and what :func:`fit` returns.
"""

import numpy as np

from analysis.statistics import FEW, interval, wilson
from config import units

BINS = 15  # of equal width, for the ECE
POINTS = 10  # of equal numbers of images, for the reliability curve
FOLDS = 5  # of patients, for the cross-validation that chooses between the methods
ACTED_AT = np.arange(1, 100) / 100  # probabilities at which somebody may act, of the decision curves
SMALLEST = 1e-8  # logits of probabilities that were rounded to 0 or 1


def logit(probabilities):
    p = np.clip(probabilities, SMALLEST, 1 - SMALLEST)
    return np.log(p) - np.log1p(-p)


def sigmoid(z):
    return 0.5 * (1 + np.tanh(0.5 * z))


def fit_logistic(design, targets, offset=0.0):
    """Maximum likelihood coefficients [K] of sigmoid(offset + design @ coefficients) by Newton's method.

    design: [N, K]; targets: [N] of 1, 0. None where there is no finite maximum (one class only, or classes that a
    threshold separates).
    """
    coefficients = np.zeros(design.shape[1])

    def likelihood(c):
        z = offset + design @ c
        return -np.logaddexp(0, np.where(targets == 1, -z, z)).sum()

    value = likelihood(coefficients)
    for _ in range(100):
        p = sigmoid(offset + design @ coefficients)
        gradient, information = design.T @ (targets - p), _information(design, p)
        if np.linalg.cond(information) > 1e14:
            return None
        step = np.linalg.solve(information, gradient)
        while likelihood(coefficients + step) < value - 1e-12 * abs(value) and np.abs(step).max() > 1e-12:
            step = step / 2  # a full step may overshoot
        coefficients = coefficients + step
        value = likelihood(coefficients)
        if np.abs(step).max() < 1e-10 * (1 + np.abs(coefficients).max()):
            return coefficients if np.abs(coefficients).max() < 1e4 else None
    return None


def _information(design, p):
    return (design * (p * (1 - p))[:, None]).T @ design


def clustered_error(design, targets, coefficients, cluster, offset=0.0):
    """Standard errors [K] of such coefficients where the rows of a patient are not independent (sandwich)."""
    p = sigmoid(offset + design @ coefficients)
    bread = np.linalg.inv(_information(design, p))
    scores = np.stack([np.bincount(cluster, column * (targets - p)) for column in design.T], 1)  # [P, K]
    patients = len(np.unique(cluster))
    meat = scores.T @ scores * patients / max(patients - 1, 1)
    return np.sqrt(np.diag(bread @ meat @ bread))


def fit_temperature(probabilities, targets):
    """One temperature for all labels, [N, L]; None where there is none above 0."""
    known = ~np.isnan(targets)
    inverse = fit_logistic(logit(probabilities[known])[:, None], targets[known])
    return None if inverse is None or inverse[0] <= 0 else float(1 / inverse[0])


def fit_platt(probabilities, targets):
    """{"slope", "intercept"} of one label, [N]; None where the targets do not allow it."""
    known = ~np.isnan(targets)
    y = targets[known]
    if not 0 < y.sum() < len(y):
        return None
    z = logit(probabilities[known])
    found = fit_logistic(np.stack([np.ones_like(z), z], 1), y)
    return None if found is None else {"slope": float(found[1]), "intercept": float(found[0])}


def scale(scaling, method, name, probabilities):
    """Probabilities [N] of the label `name` by a method of what :func:`fit` returned; NaN where that has none."""
    if method == "none":
        return probabilities
    if method == "platt":
        platt = scaling["platt"][name] or {"slope": np.nan, "intercept": np.nan}
        return sigmoid(platt["slope"] * logit(probabilities) + platt["intercept"])
    return sigmoid(logit(probabilities) / (scaling["temperature"] or np.nan))


def _cross_validated(probabilities, targets, cluster):
    """Log loss of each method on patients that it was not fitted on: method -> [L], NaN where a fold cannot fit it."""
    patients = int(cluster.max()) + 1
    fold = (np.random.default_rng(0).permutation(patients) % FOLDS)[cluster]
    total = dict.fromkeys(("none", "temperature", "platt"), 0.0)
    for k in range(min(FOLDS, patients)):
        fitted, out = fold != k, fold == k
        platt = [fit_platt(p, y) for p, y in zip(probabilities[fitted].T, targets[fitted].T)]
        scaling = {"temperature": fit_temperature(probabilities[fitted], targets[fitted]), "platt": platt}
        for method in total:
            z = logit(np.stack([scale(scaling, method, k, p) for k, p in enumerate(probabilities[out].T)], 1))
            z = np.where(targets[out] == 1, -z, z)
            losses = np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))
            total[method] = total[method] + np.where(np.isnan(targets[out]), 0, losses).sum(0)
    return total


def _fault_of_slope(probabilities, targets, cluster, platt, counts, unit):
    """Why Platt scaling of one label is not to be used, or an empty text.

    counts: images with the label, without it, and the patients that have either (None where they are unknown).
    """
    smallest = min(counts)
    if smallest == 0:
        return "one class only in the validation split"
    if smallest < FEW:
        which = "positive" if counts[0] == smallest else "negative"
        return f"{smallest} {which} {units(unit)} in the validation split, at least {FEW} are needed"
    if platt is None:
        return "a threshold separates the classes of the validation split"
    known = ~np.isnan(targets)
    z = logit(probabilities[known])
    design, c = np.stack([np.ones_like(z), z], 1), np.array([platt["intercept"], platt["slope"]])
    low = c[1] - 1.96 * clustered_error(design, targets[known], c, cluster[known])[1]
    return "" if low > 0 else f"the slope is not clearly positive ({c[1]:.2f}, 95% interval from {low:.2f})"


def fit(probabilities, targets, cluster, label_names, unit="patient"):
    """Both scalings on the validation split, [N, L], and of each label the one to use.

    The temperature is used where its cross-validated log loss over all labels is below that of the probabilities as
    they are. Platt scaling of a label is used where the label has FEW patients of each class, its slope is above 0 with
    95% confidence, and its cross-validated log loss is the lowest of the label. Patients are never in two folds.

    Returns:
        {"temperature": number or None, "platt": {label: {"slope", "intercept"} or None}, "chosen": {label: {"method":
        "platt", "temperature" or "none", "why": text, "log_loss": {method: cross-validated mean, or None}}}}.
    """
    temperature = fit_temperature(probabilities, targets)
    losses = _cross_validated(probabilities, targets, cluster)
    whole = {method: losses[method].sum() for method in ("none", "temperature")}
    # A NaN compares as False: what a fold cannot fit is not used.
    fallback = "temperature" if temperature is not None and whole["temperature"] < whole["none"] else "none"
    why_fallback = f"{'no' if fallback == 'none' else 'the'} temperature is better than none in cross-validation"
    platt, chosen = {}, {}
    for k, name in enumerate(label_names):
        p, y = probabilities[:, k], targets[:, k]
        counts = [len(np.unique(cluster[y == value])) for value in (1, 0)]
        platt[name] = fit_platt(p, y)
        fault = _fault_of_slope(p, y, cluster, platt[name], counts, unit)
        if fault:
            platt[name] = None
        images = int((~np.isnan(y)).sum())
        found = {m: float(v[k] / images) if images and np.isfinite(v[k]) else None for m, v in losses.items()}
        better = not fault and losses["platt"][k] < losses[fallback][k]
        why = fault or f"Platt scaling is {'better' if better else 'no better'} in cross-validation"
        if not better:
            why += f"; {why_fallback}"
        chosen[name] = {"method": "platt" if better else fallback, "why": why, "log_loss": found}
    return {"temperature": temperature, "platt": platt, "chosen": chosen}


def expected_calibration_error(probabilities, targets):
    """Mean over BINS of |mean probability - share of positives|, weighted by the images in each."""
    index = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(index, probabilities - targets, BINS)
    return float(np.abs(gaps).sum() / len(targets))


def _within(value, error):
    """A figure; without an interval where the error is 0 (one patient) or none."""
    low, high = (float(value + sign * 1.96 * error) if error > 1e-12 else None for sign in (-1, 1))
    return {"value": float(value), "low": low, "high": high}


def measure(probabilities, targets, cluster, weights):
    """Calibration of one label, [N]: slope, intercept, Brier score (each with an interval), ECE, reliability curve.

    slope: of a logistic regression of the targets on z (1 is right; below 1 the probabilities are too extreme);
    intercept: of the same with the slope held at 1 (0 is right; below 0 they are too high on the whole).
    weights: [P, B] of :func:`analysis.statistics.draw`.
    """
    known = ~np.isnan(targets)
    p, y, cluster = probabilities[known], targets[known], cluster[known]
    if not 0 < y.sum() < len(y):
        return {"left_out": "one class only"}
    z, ones = logit(p), np.ones((len(y), 1))
    both = np.hstack([ones, z[:, None]])
    found = {"images": len(y), "slope": None, "intercept": None}
    if (c := fit_logistic(both, y)) is not None:
        found["slope"] = _within(c[1], clustered_error(both, y, c, cluster)[1])
    if (c := fit_logistic(ones, y, z)) is not None:
        found["intercept"] = _within(c[0], clustered_error(ones, y, c, cluster, z)[0])
    patients = len(weights)
    squares = np.bincount(cluster, (p - y) ** 2, patients)
    counts = np.bincount(cluster, minlength=patients)
    with np.errstate(invalid="ignore"):
        low, high = interval((squares @ weights) / (counts @ weights))
    found["brier"] = {"value": float(squares.sum() / len(y)), "low": low, "high": high}
    found["ece"] = expected_calibration_error(p, y)
    found["curve"] = _reliability(p, y, cluster, patients)
    return found


def _reliability(p, y, cluster, patients):
    """{"probability", "rate", "low", "high"}: POINTS parts of equal numbers of images; Wilson's intervals."""
    part = np.searchsorted(np.percentile(p, np.linspace(0, 100, POINTS + 1))[1:-1], p)
    curve = {key: [] for key in ("probability", "rate", "low", "high")}
    for rows in (part == k for k in np.unique(part)):
        ends = wilson(np.bincount(cluster[rows], y[rows], patients), np.bincount(cluster[rows], minlength=patients))
        low, high = (0.0, 1.0) if ends[0] is None else ends  # of one patient: nothing is known
        for key, value in zip(curve, (p[rows].mean(), y[rows].mean(), low, high)):
            curve[key].append(float(value))
    return curve


# ------------------------------------------------ decision curves (Vickers and Elkin 2006)
def net_benefit(probabilities, targets, thresholds=ACTED_AT):
    """True positives minus false positives at the odds of the threshold, per image; [T] of one label [N].

    An image is called positive where its probability is at or above the threshold; targets are 1, 0, NaN (unknown).
    """
    known = ~np.isnan(targets)
    called = probabilities[known][:, None] >= thresholds
    positive = (targets[known] == 1)[:, None]
    return (called & positive).mean(0) - (called & ~positive).mean(0) * thresholds / (1 - thresholds)


def decision_curves(predictions, scaling):
    """{"thresholds", "labels": {label: {"before", "calibrated", "all"}}} of the labels that have both classes.

    before: of the probabilities as predicted; calibrated: as --calibrated applies it, by `scaling` of calibration.fit
    (or None); all: of calling every image positive. Calling none is 0.
    """
    found = {}
    for k, name in enumerate(predictions.label_names):
        p, y = predictions.probabilities[:, k], predictions.targets[:, k]
        if len(set(y[~np.isnan(y)])) < 2:
            continue
        kinds = {"before": p, "all": np.ones_like(p)}
        if scaling:
            kinds["calibrated"] = scale(scaling, scaling["chosen"][name]["method"], name, p)
        found[name] = {kind: [round(float(v), 6) for v in net_benefit(q, y)] for kind, q in kinds.items()}
    return {"thresholds": ACTED_AT.tolist(), "labels": found}
