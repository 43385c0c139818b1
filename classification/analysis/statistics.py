"""AUROC and average precision with what their uncertainty needs: patients, not images, are independent.

Arrays: scores and targets [N, L], targets 1, 0 or NaN (unknown, counts nowhere); cluster [N], the number of each
image's patient, 0 to P - 1; weights [P, B], how often each patient is in each of B resamples.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit, stdtrit

CHUNK = 64  # resamples at a time: the cumulative sums of 5,000 images then stay in the processor's cache
FEW = 10  # below so many positive patients neither the bootstrap nor the clustered variance is to be trusted
LEVEL = 0.95
GROUPS = 300  # of patients that the jackknife leaves out in turn, at most


def draw(patients, resamples, seed):
    """Multiplicities of a bootstrap over patients: [P, B] int32, each column a draw of P patients with replacement.

    One patient cannot be resampled: B is 0 then, and there is no interval.
    """
    if patients < 2:
        return np.ones((patients, 0), np.int32)
    rng = np.random.default_rng(seed)
    return np.ascontiguousarray(rng.multinomial(patients, [1 / patients] * patients, size=resamples).T, dtype=np.int32)


class Ranking:
    """One label's known images in falling order of their scores, ties as one step."""

    def __init__(self, scores, targets, cluster):
        known = ~np.isnan(targets)
        scores, positive, cluster = scores[known], targets[known] == 1, cluster[known]
        order = np.argsort(-scores, kind="stable")
        scores, positive, cluster = scores[order], positive[order], cluster[order]
        ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, int)
        self.thresholds = scores[ends]
        self.cluster = {True: cluster[positive], False: cluster[~positive]}
        # How many images of a class lie at or above each threshold: [G].
        self.count = {True: np.cumsum(positive)[ends], False: np.cumsum(~positive)[ends]}
        self.both = 0 < positive.sum() < len(positive)

    def cumulative(self, weights, of):
        """Weight of the positives (of=True) or negatives at or above 0, 1, 2 ... of them: [n + 1, B]."""
        rows = self.cluster[of]
        sums = np.zeros((len(rows) + 1, weights.shape[1]), np.int32)
        np.cumsum(weights[rows], axis=0, out=sums[1:])
        return sums

    def areas(self, weights):
        """(AUROC, average precision) [B] of the resamples; NaN where one class is absent.

        They equal scikit-learn's on the rows repeated by their weights. Steps without positives add to neither,
        so the sums run over the others only.
        """
        auroc, precision = np.full((2, weights.shape[1]), np.nan)
        if not self.both:
            return auroc, precision
        above = {c: np.append(0, self.count[c]) for c in (True, False)}
        steps = np.flatnonzero(np.diff(above[True]))
        for start in range(0, weights.shape[1], CHUNK):
            here = slice(start, start + CHUNK)
            p, n = (self.cumulative(weights[:, here], c) for c in (True, False))
            defined = (p[-1] > 0) & (n[-1] > 0)
            after, false = p[above[True][steps + 1]], n[above[False][steps + 1]]
            gain = (after - p[above[True][steps]]).astype(float)
            below = n[-1] - (n[above[False][steps]] + false) / 2  # negatives outranked, a tie as half a one
            with np.errstate(invalid="ignore", divide="ignore"):
                auroc[here] = np.where(defined, (gain * below).sum(0) / (p[-1] * n[-1].astype(float)), np.nan)
                share = after / np.maximum(after + false, 1)
                precision[here] = np.where(defined, (gain * share).sum(0) / p[-1], np.nan)
        return auroc, precision

    def curves(self, weights, grid):
        """(sensitivity at 1 - specificity, precision at sensitivity) on `grid` [K]: [K, B] each, NaN if undefined."""
        roc, pr = np.full((2, len(grid), weights.shape[1]), np.nan)
        if not self.both:
            return roc, pr
        p, n = (self.cumulative(weights, c)[np.append(0, self.count[c])].astype(float) for c in (True, False))
        for b in range(weights.shape[1]):
            if p[-1, b] and n[-1, b]:
                recall = p[:, b] / p[-1, b]
                roc[:, b] = np.interp(grid, n[:, b] / n[-1, b], recall)
                at = np.maximum(np.searchsorted(recall, grid - 1e-12), 1)
                pr[:, b] = p[at, b] / np.maximum(p[at, b] + n[at, b], 1)
        return roc, pr


def bootstrap(scores, targets, cluster, weights):
    """AUROC and average precision of every label in every resample: two arrays [L, B], NaN where undefined."""
    areas = [Ranking(s, t, cluster).areas(weights) for s, t in zip(scores.T, targets.T)]
    return np.array([a for a, _ in areas]), np.array([p for _, p in areas])


def mean_defined(values):
    """Mean over the labels [L, ...] that have a value, NaN where none has: the mean of this project."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def interval(draws):
    """Percentile interval (low, high) of the draws [B] that are defined; (None, None) if none is.

    Also (None, None) where all draws are equal: a bootstrap that never varies says nothing about uncertainty.
    """
    defined = draws[~np.isnan(draws)]
    if not len(defined) or np.ptp(defined) < 1e-12:
        return None, None
    return tuple(float(v) for v in np.percentile(defined, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]))


def leave_out(patients):
    """Weights [P, G] of the jackknife: all patients but one group of them, at random; one patient a group up to GROUPS.

    G is 0 for a single patient.
    """
    groups = min(patients, GROUPS) if patients > 1 else 0
    of = np.random.default_rng(0).permutation(patients) % max(groups, 1)
    return (of[:, None] != np.arange(groups)).astype(np.int32)


def precision_interval(values, left_out, positives):
    """(low, high, bias) of the mean of L average precisions; L is 1 for a single label.

    values: [L]; left_out: [L, G], of :func:`leave_out`; positives: patients that have each label, [L]. A label whose
    positives are all in one group counts uncorrected, with the variance of a uniform number; (None, None, None) where
    all labels are such.

    An average precision is too high, since each positive counts in its own precision. With m positives and an average
    precision p the bias is proportional to log(1 + x) / m, x = m / p (integrate 1 / (1 + m u / p) over the recall u).
    The jackknife (Quenouille 1956) is exact for 1 / m and sees of this the share 1 - x / (1 + x) / log(1 + x). The
    interval is Student's t on the logit scale around the corrected value, its degrees of freedom the positive patients
    less one; of a mean, in which the patients with the most images count in all labels at once, the effective number of
    patients (their squared contributions: the square of the sum over the sum of the squares). Coverage:
    benchmarks/README.md.
    """
    groups = left_out.shape[1]
    alone = np.isnan(left_out).any(1)
    if groups == 0 or alone.all():
        return None, None, None
    left_out = np.where(np.isnan(left_out), values[:, None], left_out)
    x = positives / values
    share = 1 - x / (1 + x) / np.log1p(x)
    bias = float(np.where(alone, 0, (groups - 1) * (left_out.mean(1) - values) / share).mean())
    value, deviations = float(values.mean()), left_out.mean(0) - left_out.mean()
    error = math.sqrt((groups - 1) / groups * (deviations @ deviations) + alone.sum() / 12 / len(values) ** 2)
    if error < 1e-12:
        return None, None, None
    corrected = min(max(value - bias, value / 3), 1 - (1 - value) / 3)
    freedom = positives[0] - 1 if len(values) == 1 else (deviations @ deviations) ** 2 / (deviations**4).sum()
    half = stdtrit(max(freedom, 1), (1 + LEVEL) / 2) * error / (corrected * (1 - corrected))
    return *(float(expit(logit(corrected) + sign * half)) for sign in (-1, 1)), bias


def wilson(hits, totals):
    """(low, high) of the proportion sum(hits) / sum(totals), both by patient [P]; (None, None) with fewer than two.

    Wilson 1927, on an effective number: images over the design effect of patients, at most all images (Korn and
    Graubard 1998). At 0 and 1, where no design effect can be estimated, the images of a patient count as one (Kish's
    number); with fewer than five hits or misses, part of the way.
    """
    counted = totals > 0
    n, patients = int(totals.sum()), int(counted.sum())
    if patients < 2:
        return None, None
    p, fewest = hits.sum() / n, min(hits.sum(), n - hits.sum())
    number = kish = n**2 / float(totals @ totals)
    if fewest:
        residuals = (hits - p * totals)[counted]
        variance = patients / (patients - 1) * float(residuals @ residuals) / n**2
        number = min(n, p * (1 - p) / variance) if variance else kish
        number = min(number, kish + (number - kish) * min(fewest, 5) / 5)
    t2 = float(stdtrit(patients - 1, (1 + LEVEL) / 2)) ** 2
    middle, half = p + t2 / (2 * number), math.sqrt(t2 * (p * (1 - p) / number + t2 / (4 * number**2)))
    low, high = ((middle + sign * half) / (1 + t2 / number) for sign in (-1, 1))
    return float(max(low, 0)), float(min(high, 1))


def largest_gap(values, draws):
    """(p, reach) of the largest difference between groups' AUROCs, whichever two groups that is.

    values: [G]; draws: [G, B], of the same resamples. p: how often resamples, each group moved to a common AUROC, have
    a gap as large (which two was not chosen beforehand, so the largest of all pairs is compared with the largest).
    value +- reach: holds the difference between these two with 95%, as it does for all pairs at once. (None, None)
    where no resample has all groups.
    """
    draws = draws[:, ~np.isnan(draws).any(0)] - values[:, None]
    if not draws.shape[1] or np.ptp(draws) < 1e-12:
        return None, None
    ranges = np.ptp(draws, axis=0)
    return float((1 + (ranges >= np.ptp(values)).sum()) / (len(ranges) + 1)), float(np.quantile(ranges, LEVEL))


@dataclass
class Placements:
    """Structural components of one label's AUROC, summed by patient and centred (DeLong 1988; Obuchowski 1997).

    positive, negative: [P]; positives, negatives: numbers of images; with_positive, with_negative: of patients.
    """

    auroc: float
    positive: np.ndarray
    negative: np.ndarray
    positives: int
    negatives: int
    with_positive: int
    with_negative: int
    patients: int
    pairs: int

    @property
    def bound(self):
        """Of classes that the scores separate: the one-sided 95% bound of the AUROC, as (low, high); else None.

        pairs: of a positive and a negative image, no patient in two of them, so independent. All are in the right
        order (or all in the wrong one), which has the probability AUROC ** pairs.
        """
        bound = (1 - LEVEL) ** (1 / self.pairs) if self.pairs else 0.0
        return {1.0: (bound, 1.0), 0.0: (0.0, 1 - bound)}.get(self.auroc)

    @property
    def share(self):
        """What each patient adds to the AUROC's deviation, [P]."""
        return self.positive / self.positives + self.negative / self.negatives


def placements(scores, targets, cluster):
    """The :class:`Placements` of one label, scores and targets [N]; None where one class is absent."""
    known, patients = ~np.isnan(targets), int(cluster.max()) + 1
    scores, positive, cluster = scores[known], targets[known] == 1, cluster[known]
    if positive.all() or not positive.any():
        return None
    x, y = scores[positive], scores[~positive]

    def above(values, others):
        """Share of `others` below each value, a tie as half a one."""
        others = np.sort(others)
        return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))

    v10, v01 = above(x, y), 1 - above(y, x)
    auroc = float(v10.mean())
    of = {c: cluster[positive == c] for c in (True, False)}
    with_positive, with_negative = (np.unique(of[c]) for c in (True, False))
    with_any = len(np.union1d(with_positive, with_negative))
    return Placements(
        auroc=auroc,
        positive=np.bincount(of[True], v10 - auroc, patients),
        negative=np.bincount(of[False], v01 - auroc, patients),
        positives=len(x),
        negatives=len(y),
        with_positive=len(with_positive),
        with_negative=len(with_negative),
        patients=with_any,
        pairs=min(len(with_positive), len(with_negative), with_any // 2),
    )


def covariance(a, b):
    """Covariance of two AUROCs of the same images and targets (a model's variance with itself), clustered by patient.

    Obuchowski 1997, Biometrics 53:567. None where fewer than two patients have a class.
    """
    if min(a.with_positive, a.with_negative, a.patients) < 2:
        return None
    m, n = a.positives, a.negatives

    def corrected(patients):
        return patients / (patients - 1)

    return float(
        corrected(a.with_positive) * (a.positive @ b.positive) / m**2
        + corrected(a.with_negative) * (a.negative @ b.negative) / n**2
        + corrected(a.patients) * (a.positive @ b.negative + a.negative @ b.positive) / (m * n)
    )


def standard_error(a, b=None):
    """Of the AUROC of `a`, or of its difference to that of `b`; None where it is not defined."""
    if a is None or covariance(a, a) is None:
        return None
    variance = covariance(a, a)
    if b is not None:
        variance += covariance(b, b) - 2 * covariance(a, b)
    return math.sqrt(max(variance, 0.0))


def mean_standard_error(labels):
    """Of the mean of several labels' AUROCs: the patients' shares averaged over the labels, then their variance."""
    shares = [p.share for p in labels if p is not None]
    if not shares:
        return None
    total, patients = sum(shares) / len(shares), len(shares[0])
    return math.sqrt(patients / (patients - 1) * float(total @ total)) if patients > 1 else None


def normal_p(difference, error):
    """Two-sided p-value of a difference that is normal with this standard error."""
    if error is None:
        return None
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / error / math.sqrt(2))


def bootstrap_p(draws):
    """Two-sided p-value of a difference whose resamples [B] are given: twice the smaller tail, itself counted in."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return None
    tail = 1 + min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * tail / (len(draws) + 1)))


def holm(p_values):
    """Holm's adjusted p-values; None stays None and does not count."""
    known = sorted((p, k) for k, p in enumerate(p_values) if p is not None)
    adjusted, largest = [None] * len(p_values), 0.0
    for rank, (p, k) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[k] = largest
    return adjusted
