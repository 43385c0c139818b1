"""How often the report's 95% intervals hold the truth, on simulated images that are alike within a patient.

    python benchmarks/coverage.py                    every interval at four shapes, some ten minutes on one core
    python benchmarks/coverage.py --shape small --draws 100

An image's score for a label is N(d, .7) if it is positive, else N(0, .7), plus its patient's N(0, .7), half of which
all labels share. So the scores of positives and negatives of different patients are normal, and the true AUROC, AUPRC,
rates, differences and Brier score are integrals; pairs within a patient have another AUROC but are a vanishing part.
The probability is the posterior of the score: slope 1 and intercept 0 are the truth. Labels differ in d, patients in
how often they are positive and in how many images they have, two models in d and in the image's noise.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analysis import calibration, statistics, thresholds

WITHIN = BETWEEN = 0.7
VARIANCE = WITHIN**2 + BETWEEN**2
SHARED = 0.5  # of a patient's variance
WORSE = 0.8  # d of the other model, as a share
CALLED = (0.05, 0.5, 0.9)  # true specificities of the thresholds of which rates are counted


@dataclass(frozen=True)
class Setting:
    """A shape of the test split. evenness: of patients; below 1 a few have most images and most positives."""

    name: str
    patients: int
    images: int
    prevalences: tuple
    evenness: float = 2.0

    @cached_property
    def d(self):
        return np.linspace(0.5, 1.8, len(self.prevalences))

    def simulate(self, rng):
        """(part of the scores that is the patient's [P, L], targets [N, L], cluster [N])."""
        labels = len(self.prevalences)
        sizes = rng.multinomial(self.images - self.patients, rng.dirichlet(np.full(self.patients, self.evenness)))
        cluster = np.repeat(np.arange(self.patients), 1 + sizes)
        odds = np.array(self.prevalences) / (1 - np.array(self.prevalences))
        risk = rng.beta(self.evenness, self.evenness / odds, (self.patients, labels))
        targets = (rng.random((self.images, labels)) < risk[cluster]).astype(float)
        of_all, own = rng.normal(size=(self.patients, 1)), rng.normal(size=(self.patients, labels))
        return BETWEEN * (math.sqrt(SHARED) * of_all + math.sqrt(1 - SHARED) * own), targets, cluster

    def scores(self, rng, of_patient, targets, cluster, share=1.0):
        """Scores [N, L] of a model; share: of d, below 1 for a worse one."""
        return share * self.d * targets + of_patient[cluster] + rng.normal(0, WITHIN, targets.shape)

    def probabilities(self, scores):
        """The posterior of the first model's scores."""
        prior = logit(np.array(self.prevalences))
        return expit(prior + self.d * scores / VARIANCE - self.d**2 / (2 * VARIANCE))

    @cached_property
    def truth(self):
        """Per label, [L]: auroc, auprc, brier, difference (of AUROC), and rates [3, L] at the thresholds `cuts` [3]."""
        s = np.linspace(-8, 12, 40001)[:, None]
        deviation, prior = math.sqrt(VARIANCE), np.array(self.prevalences)
        sensitivity, false = ndtr(-(s - self.d) / deviation), ndtr(-s / deviation)
        precision = prior * sensitivity / np.maximum(prior * sensitivity + (1 - prior) * false, 1e-300)
        p = self.probabilities(s)

        def over(values, tail):  # integral of values over the distribution whose upper tail is given
            return -((values[1:] + values[:-1]) / 2 * np.diff(tail, axis=0)).sum(0)

        auroc, worse = (ndtr(share * self.d / math.sqrt(2 * VARIANCE)) for share in (1, WORSE))
        found = {"auroc": auroc, "auprc": over(precision, sensitivity), "difference": auroc - worse}
        found["brier"] = prior * over((1 - p) ** 2, sensitivity) + (1 - prior) * over(p**2, false)
        cuts = deviation * ndtri(CALLED)[:, None]
        up, un = ndtr(-(cuts - self.d) / deviation), ndtr(-cuts / deviation)
        found["sensitivity"], found["specificity"] = up, np.broadcast_to(1 - un, up.shape)
        found["ppv"] = prior * up / (prior * up + (1 - prior) * un)
        found["npv"] = (1 - prior) * (1 - un) / ((1 - prior) * (1 - un) + prior * (1 - up))
        return found | {"cuts": cuts[:, 0]}


SETTINGS = {
    s.name: s
    for s in (
        Setting("small", 110, 225, (0.09,) * 14),
        Setting("tail", 72, 362, tuple(np.geomspace(0.004, 0.25, 26))),
        Setting("official", 293, 5159, tuple(np.geomspace(0.02, 0.4, 14))),
        Setting("uneven", 293, 5159, tuple(np.geomspace(0.02, 0.4, 14)), evenness=0.7),
    )
}


class Tally:
    """How often each interval held the truth, and on which side it missed."""

    def __init__(self):
        self.found = {}

    def add(self, name, interval, truth):
        low, high = interval[:2]
        if low is None:
            self.found.setdefault(name, []).append((np.nan,) * 4)
        else:
            self.found.setdefault(name, []).append((low <= truth <= high, truth < low, truth > high, high - low))

    def lines(self):
        yield "| interval | holds the truth | truth below it | above it | mean width | none |"
        yield "|---|---:|---:|---:|---:|---:|"
        for name, rows in self.found.items():
            rows = np.array(rows, float)
            none = np.isnan(rows[:, 0]).mean()
            holds, below, above, width = np.nanmean(rows, 0)
            yield f"| {name} | {holds:.1%} | {below:.1%} | {above:.1%} | {width:.3f} | {none:.1%} |"


def one_draw(setting, seed, resamples, tally):
    """Simulate a test split, and add all its intervals to the tally."""
    rng, truth = np.random.default_rng(seed), setting.truth
    add, percentile, jackknife = tally.add, statistics.interval, statistics.precision_interval
    of_patient, targets, cluster = setting.simulate(rng)
    scores, other = (setting.scores(rng, of_patient, targets, cluster, share) for share in (1, WORSE))
    patients, names = setting.patients, range(scores.shape[1])
    weights, ones = statistics.draw(patients, resamples, seed), np.ones((patients, 1), np.int32)
    values, precisions = (v[:, 0] for v in statistics.bootstrap(scores, targets, cluster, ones))
    drawn, percentiles = statistics.bootstrap(scores, targets, cluster, weights)
    others, _ = statistics.bootstrap(other, targets, cluster, weights)
    _, left_out = statistics.bootstrap(scores, targets, cluster, statistics.leave_out(patients))
    placed, theirs = ([statistics.placements(s, t, cluster) for s, t in zip(x.T, targets.T)] for x in (scores, other))
    positive = np.array([len(np.unique(cluster[t == 1])) for t in targets.T])
    fine = positive >= statistics.FEW
    for k in names:
        few = "" if fine[k] else f", fewer than {statistics.FEW} patients"
        if placed[k] is None:
            continue
        add(f"AUROC{few}", placed[k].bound or percentile(drawn[k]), truth["auroc"][k])
        add(f"AUPRC{few}", jackknife(precisions[[k]], left_out[[k]], positive[[k]]), truth["auprc"][k])
        if fine[k]:
            add("AUPRC by percentiles of the bootstrap (not used)", percentile(percentiles[k]), truth["auprc"][k])
            alone = statistics.placements(scores[:, k], targets[:, k], np.arange(len(scores)))
            independent = values[k] + 1.96 * statistics.standard_error(alone) * np.array([-1, 1])
            add("AUROC by DeLong, images independent (not used)", independent, truth["auroc"][k])
            add("difference of two AUROCs", percentile(drawn[k] - others[k]), truth["difference"][k])
    k = np.flatnonzero(~np.isnan(values))
    mean = {name: truth[name][k].mean() for name in ("auroc", "auprc", "difference")}
    means, of_percentiles, of_others = (statistics.mean_defined(draws[k]) for draws in (drawn, percentiles, others))
    add("mean AUROC", percentile(means), mean["auroc"])
    add("mean AUPRC", jackknife(precisions[k], left_out[k], positive[k]), mean["auprc"])
    add("mean AUPRC by percentiles of the bootstrap (not used)", percentile(of_percentiles), mean["auprc"])
    add("difference of two mean AUROCs", percentile(means - of_others), mean["difference"])
    for j, cut in enumerate(truth["cuts"]):
        for k in names:
            found = thresholds.apply(cut, scores[:, k], targets[:, k], cluster)
            for rate in thresholds.RATES:
                true = truth[rate][j, k]
                extreme = " above .98 or below .02" * (not 0.02 <= true <= 0.98)
                add(f"{rate}{extreme}", (found[rate]["low"], found[rate]["high"]), true)
    for k in np.flatnonzero(fine):
        p = setting.probabilities(scores)[:, k]
        found = calibration.measure(p, targets[:, k], cluster, weights)
        for name, true in (("slope", 1), ("intercept", 0), ("brier", truth["brier"][k])):
            if found[name]:
                add(name, (found[name]["low"], found[name]["high"]), true)


def gaps(setting, seed, resamples):
    """Three random groups of patients: p of the largest gap of each label that all three can judge."""
    rng = np.random.default_rng(seed)
    of_patient, targets, cluster = setting.simulate(rng)
    scores = setting.scores(rng, of_patient, targets, cluster)
    of, weights = rng.integers(0, 3, setting.patients)[cluster], statistics.draw(setting.patients, resamples, seed)
    ones, found = np.ones((setting.patients, 1), np.int32), []
    parts = [of == g for g in range(3)]
    values, drawn = (
        [statistics.bootstrap(scores[rows], targets[rows], cluster[rows], w)[0] for rows in parts]
        for w in (ones, weights)
    )
    for k in range(scores.shape[1]):
        counts = [len(np.unique(cluster[rows & (targets[:, k] == c)])) for rows in parts for c in (0, 1)]
        if min(counts) >= statistics.FEW:
            p, _ = statistics.largest_gap(np.array([v[k, 0] for v in values]), np.array([d[k] for d in drawn]))
            found.append(p)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=400, help="of the bootstrap")
    args = parser.parse_args()
    for name in args.shape:
        setting, tally, started, tests = SETTINGS[name], Tally(), time.time(), []
        for draw in range(args.draws):
            one_draw(setting, draw, args.resamples, tally)
            tests.append(gaps(setting, draw, args.resamples))
        prevalences = sorted({f"{p:.0%}" for p in (min(setting.prevalences), max(setting.prevalences))})
        print(
            f"\n{name}: {setting.images:,} images of {setting.patients} patients (evenness {setting.evenness:g}), "
            f"{len(setting.prevalences)} labels of {' to '.join(prevalences)}; {args.draws} draws, "
            f"{args.resamples} resamples, {time.time() - started:.0f} s\n"
        )
        print("\n".join(tally.lines()))
        p = [p for found in tests for p in found]
        if p:
            reports = [min(statistics.holm(found)) < 0.05 for found in tests if found]
            print(
                f"\nLargest gap of three random groups: p < .05 in {np.mean(np.array(p) < 0.05):.1%} of the labels, "
                f"after Holm in {np.mean(reports):.1%} of the reports."
            )


if __name__ == "__main__":
    main()
