"""How far probabilities can be taken at their word, and two ways to mend them: temperature and Platt scaling.

Both are fitted on the validation split and act on z = logit(probability) of a label:

    temperature   sigmoid(z / temperature), one temperature for all labels
    Platt         sigmoid(slope * z + intercept), a pair for each label

`calibration.json`, for predict.py --calibrated, holds {"fitted_on": file, "images": N, "label_names": [...],
"checkpoint_sha256": text or null, "temperature": number or null, "platt": {label: {"slope": ..., "intercept": ...} or
null}}; null where the validation split cannot fit it.
"""

import numpy as np
from sklearn.calibration import calibration_curve

BINS = 15  # of equal width, for the ECE
POINTS = 10  # of equal numbers of images, for the reliability curve
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


def apply_temperature(probabilities, temperature):
    return sigmoid(logit(probabilities) / temperature)


def apply_platt(probabilities, platt):
    """Of one label, [N] -> [N]."""
    return sigmoid(platt["slope"] * logit(probabilities) + platt["intercept"])


def expected_calibration_error(probabilities, targets):
    """Mean over BINS of |mean probability - share of positives|, weighted by the images in each."""
    index = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(index, probabilities - targets, BINS)
    return float(np.abs(gaps).sum() / len(targets))


def _within(value, error):
    return {"value": float(value), "low": float(value - 1.96 * error), "high": float(value + 1.96 * error)}


def measure(probabilities, targets, cluster, weights, interval):
    """Calibration of one label, [N]: slope, intercept, Brier score (each with an interval), ECE, reliability curve.

    slope: of a logistic regression of the targets on z (1 is right; below 1 the probabilities are too extreme);
    intercept: of the same with the slope held at 1 (0 is right; below 0 they are too high on the whole).
    weights: [P, B] of :func:`analysis.statistics.draw`; interval: draws [B] -> (low, high).
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
    rate, mean = calibration_curve(y, p, n_bins=POINTS, strategy="quantile")
    found["curve"] = {"probability": mean.tolist(), "rate": rate.tolist()}
    return found
