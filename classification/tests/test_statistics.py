"""Intervals, clustered variance, thresholds and calibration against truths of their own."""

import math
import sys

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, log_loss, roc_auc_score, roc_curve

from analysis import applied, calibration, groups, statistics, thresholds
from conftest import ROOT


def clustered(seed=0, patients=40, images=300, ties=True):
    """Scores, targets and patients of one label, alike within a patient; scores of two decimals tie."""
    rng = np.random.default_rng(seed)
    cluster = np.concatenate([np.arange(patients), rng.integers(0, patients, images - patients)])
    sick = rng.normal(size=patients)[cluster]
    targets = (sick + rng.normal(size=images) > 0.8).astype(float)
    scores = 1 / (1 + np.exp(-(targets + 0.7 * sick + rng.normal(size=images))))
    return scores.round(2) if ties else scores, targets, cluster


@pytest.mark.parametrize("ties", [True, False])
def test_a_resample_equals_scikit_learn_on_the_resampled_rows(ties):
    scores, targets, cluster = clustered(ties=ties)
    targets[::7] = np.nan
    weights = statistics.draw(40, 150, seed=3)  # more than one chunk
    assert (weights.sum(0) == 40).all()
    auroc, precision = statistics.bootstrap(scores[:, None], targets[:, None], cluster, weights)
    known = ~np.isnan(targets)
    for b in range(150):
        rows = np.repeat(np.flatnonzero(known), weights[cluster[known], b])
        assert auroc[0, b] == pytest.approx(roc_auc_score(targets[rows], scores[rows]), abs=1e-12)
        assert precision[0, b] == pytest.approx(average_precision_score(targets[rows], scores[rows]), abs=1e-12)


def test_resamples_without_a_class_are_undefined_not_dropped():
    scores, targets = np.array([0.1, 0.4, 0.3, 0.9]), np.array([0.0, 0.0, 0.0, 1.0])
    weights = statistics.draw(4, 4000, seed=0)
    auroc, precision = statistics.bootstrap(scores[:, None], targets[:, None], np.arange(4), weights)
    without = (weights[3] == 0) | (weights[:3].sum(0) == 0)
    np.testing.assert_array_equal(np.isnan(auroc[0]), without)
    np.testing.assert_array_equal(np.isnan(precision[0]), without)
    assert without.mean() == pytest.approx((3 / 4) ** 4 + (1 / 4) ** 4, abs=0.03)
    assert statistics.interval(auroc[0]) == (None, None)  # 1 in every resample: that is no interval
    assert statistics.interval(np.full(5, np.nan)) == (None, None)
    one_class = statistics.bootstrap(scores[:, None], np.ones((4, 1)), np.arange(4), weights)
    assert np.isnan(one_class).all()


def test_draw_is_seeded_and_one_patient_cannot_be_drawn():
    np.testing.assert_array_equal(statistics.draw(9, 20, 1), statistics.draw(9, 20, 1))
    assert (statistics.draw(9, 20, 1) != statistics.draw(9, 20, 2)).any()
    assert statistics.draw(1, 20, 0).shape == (1, 0)


def obuchowski_by_loops(scores, targets, cluster):
    """(covariance [M, M] of the AUROCs of the columns of `scores`), as the paper writes it, image by image."""
    models = scores.shape[1]
    positive, negative = np.flatnonzero(targets == 1), np.flatnonzero(targets == 0)
    m, n = len(positive), len(negative)
    v10, v01 = np.zeros((models, m)), np.zeros((models, n))
    for r in range(models):
        for i, p in enumerate(positive):
            for j, q in enumerate(negative):
                a, b = scores[p, r], scores[q, r]
                psi = 1.0 if a > b else 0.5 if a == b else 0.0
                v10[r, i] += psi / n
                v01[r, j] += psi / m
    auc = v10.mean(1)
    patients = sorted(set(cluster))
    with_positive = len({cluster[p] for p in positive})
    with_negative = len({cluster[q] for q in negative})
    s10, s01, s11 = (np.zeros((models, models)) for _ in range(3))
    for i in patients:
        mine = [k for k, p in enumerate(positive) if cluster[p] == i]
        others = [k for k, q in enumerate(negative) if cluster[q] == i]
        for r in range(models):
            for s in range(models):
                a = {k: sum(v10[k, i] for i in mine) - len(mine) * auc[k] for k in (r, s)}
                b = {k: sum(v01[k, j] for j in others) - len(others) * auc[k] for k in (r, s)}
                s10[r, s] += a[r] * a[s]
                s01[r, s] += b[r] * b[s]
                s11[r, s] += a[r] * b[s]
    s10 *= with_positive / ((with_positive - 1) * m)
    s01 *= with_negative / ((with_negative - 1) * n)
    s11 *= len(patients) / (len(patients) - 1)
    return s10 / m + s01 / n + s11 / (m * n) + s11.T / (m * n)


def test_clustered_covariance_equals_the_formula_in_loops():
    scores, targets, cluster = clustered(images=120)
    other = (scores + np.random.default_rng(1).normal(0, 0.1, 120)).round(2)
    truth = obuchowski_by_loops(np.stack([scores, other], 1), targets, cluster)
    a, b = (statistics.placements(s, targets, cluster) for s in (scores, other))
    assert a.auroc == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
    found = [[statistics.covariance(x, y) for y in (a, b)] for x in (a, b)]
    np.testing.assert_allclose(found, truth, rtol=1e-10)
    expected = math.sqrt(truth[0, 0] + truth[1, 1] - 2 * truth[0, 1])
    assert statistics.standard_error(a, b) == pytest.approx(expected, rel=1e-9)
    # The mean of one label is that label, but for the correction of the number of patients.
    mean = statistics.mean_standard_error([a])
    assert mean == pytest.approx(statistics.standard_error(a), rel=0.03)
    assert statistics.mean_standard_error([a, a]) == pytest.approx(mean)


def test_without_clusters_it_is_delongs_variance():
    scores, targets, _ = clustered(images=200, ties=False)
    x, y = scores[targets == 1], scores[targets == 0]
    v10 = (x[:, None] > y).mean(1)
    v01 = (x[:, None] > y).mean(0)
    delong = v10.var(ddof=1) / len(x) + v01.var(ddof=1) / len(y)
    placed = statistics.placements(scores, targets, np.arange(200))
    assert statistics.covariance(placed, placed) == pytest.approx(delong, rel=1e-10)


def test_clustered_error_and_bootstrap_agree_and_exceed_the_naive_error():
    """As on the official test split (FACTS): images of a patient are not independent."""
    rng = np.random.default_rng(2)
    cluster = np.repeat(np.arange(150), 12)
    risk = rng.beta(1, 4, 150)[cluster]
    targets = (rng.random(1800) < risk).astype(float)
    scores = targets + rng.normal(size=150)[cluster] + 0.5 * rng.normal(size=1800)
    placed = statistics.placements(scores, targets, cluster)
    alone = statistics.placements(scores, targets, np.arange(1800))
    drawn = statistics.bootstrap(scores[:, None], targets[:, None], cluster, statistics.draw(150, 2000, 0))[0]
    assert drawn.std() == pytest.approx(statistics.standard_error(placed), rel=0.1)
    assert statistics.standard_error(placed) > 1.5 * statistics.standard_error(alone)


def test_one_patient_with_a_class_has_no_variance():
    scores, targets = np.array([0.2, 0.8, 0.6, 0.4]), np.array([0.0, 1.0, 0.0, 1.0])
    assert statistics.standard_error(statistics.placements(scores, targets, np.array([0, 0, 1, 0]))) is None
    assert statistics.placements(scores, np.ones(4), np.arange(4)) is None
    assert statistics.standard_error(None) is None


# ------------------------------------------------------------------------------------- intervals
def wilson_score(p, n, z):
    """Wilson 1927: the ends of the proportions that a test at this z does not reject, by bisection."""
    found = []
    for edge in (0.0, 1.0):
        inside, outside = p, edge
        for _ in range(200):
            middle = (inside + outside) / 2
            if abs(p - middle) > z * math.sqrt(middle * (1 - middle) / n):
                outside = middle
            else:
                inside = middle
        found.append(inside)
    return found


@pytest.mark.parametrize("hits", [0, 30, 100])
def test_independent_images_have_wilsons_interval(hits):
    patients = 100
    found = statistics.wilson(np.arange(patients) < hits, np.ones(patients, int))
    z = stats.t.ppf(0.975, patients - 1)
    n = patients if hits in (0, patients) else patients - 1  # the variance of patients has P - 1 below it
    assert found == pytest.approx(wilson_score(hits / patients, n, z), abs=1e-9)
    assert found[1] - found[0] > 0.03


def test_images_of_a_patient_that_agree_count_as_one():
    """30 patients of five images, each patient all right or all wrong: the interval of 30 images, not of 150."""
    hits, totals = np.where(np.arange(30) < 20, 5, 0), np.full(30, 5)
    alone = statistics.wilson(hits // 5, totals // 5)
    assert statistics.wilson(hits, totals) == pytest.approx(alone, abs=1e-12)
    for all_right in (totals, 0 * totals):
        assert statistics.wilson(all_right, totals) == pytest.approx(statistics.wilson(all_right // 5, totals // 5))
    four = statistics.wilson(np.array([1, 1, 1, 1]), np.ones(4, int))  # NPV 1.000 from four images
    assert four[0] < 0.5 and four[1] == 1
    assert statistics.wilson(np.array([3, 0]), np.array([4, 0])) == (None, None)  # one patient


def test_separated_classes_have_a_one_sided_bound():
    """With that AUROC, and no other, all independent pairs are in the right order in 5% of the draws."""
    scores, targets = np.concatenate([np.full(6, 2.0), np.arange(9) / 9]), np.repeat([1.0, 0.0], [6, 9])
    placed = statistics.placements(scores, targets, np.arange(15))
    assert placed.pairs == 6 and placed.bound[1] == 1.0
    rng = np.random.default_rng(0)
    ordered = (rng.random((200_000, 6)) < placed.bound[0]).all(1)
    assert ordered.mean() == pytest.approx(0.05, abs=0.002)
    reversed_ = statistics.placements(-scores, targets, np.arange(15))
    assert reversed_.bound == (0.0, pytest.approx(1 - placed.bound[0]))
    # Five patients, each with a positive and a negative image: two pairs without a patient in common.
    cluster = np.concatenate([np.arange(5), np.arange(5)])
    both = statistics.placements(np.repeat([2.0, 1.0], 5), np.repeat([1.0, 0.0], 5), cluster)
    assert both.pairs == 2 and both.bound[0] == pytest.approx(0.05**0.5)
    assert statistics.placements(np.arange(15.0), targets, np.arange(15)).bound == (
        0.0,
        pytest.approx(0.393, abs=0.001),
    )
    assert statistics.placements(np.append(scores, 0.5), np.append(targets, 1.0), np.arange(16)).bound is None


def test_precision_interval_equals_a_jackknife_in_loops():
    scores, targets, cluster = clustered(patients=40)
    value, weights = average_precision_score(targets, scores), statistics.leave_out(40)
    assert sorted(np.argmin(weights, 0)) == list(range(40)) and (weights.sum(0) == 39).all()
    left_out = statistics.bootstrap(scores[:, None], targets[:, None], cluster, weights)[1]
    loops = np.array([average_precision_score(targets[cluster != k], scores[cluster != k]) for k in range(40)])
    np.testing.assert_allclose(np.sort(left_out[0]), np.sort(loops), atol=1e-12)
    positives = len(np.unique(cluster[targets == 1]))
    low, high, bias = statistics.precision_interval(np.array([value]), left_out, np.array([positives]))
    x = positives / value

    # The share of a bias log(1 + x) / m that a jackknife sees: - m d/dm of it, over it; by a difference quotient.
    def true_bias(m):
        return math.log1p(m / value) / m

    share = -positives * (true_bias(positives * 1.00001) - true_bias(positives / 1.00001)) / (
        2e-5 * positives * true_bias(positives)
    )  # fmt: skip
    assert x > 10 and bias == pytest.approx(39 * (loops.mean() - value) / share, rel=1e-4)
    error = math.sqrt(39 / 40 * ((loops - loops.mean()) ** 2).sum())
    middle = value - bias
    logits = [math.log(p / (1 - p)) for p in (low, middle, high)]
    half = stats.t.ppf(0.975, positives - 1) * error / (middle * (1 - middle))
    assert (logits[1] - logits[0], logits[2] - logits[1]) == pytest.approx((half, half))
    many = statistics.leave_out(1000)
    assert many.shape == (1000, statistics.GROUPS) and ((many == 0).sum(1) == 1).all()
    assert statistics.precision_interval(np.array([0.5]), np.array([[0.4, np.nan]]), np.array([1])) == (None,) * 3
    assert statistics.leave_out(1).shape == (1, 0)


def test_a_label_of_one_patient_counts_with_the_variance_of_a_uniform_number():
    """In the mean of two labels, of which the second has its positives in the last group alone."""
    values, positives = np.array([0.6, 0.2]), np.array([30, 1])
    left_out = np.array([[0.58, 0.61, 0.6, 0.63], [0.21, 0.2, 0.22, np.nan]])
    low, high, bias = statistics.precision_interval(values, left_out, positives)
    means = (left_out[0] + np.array([0.21, 0.2, 0.22, 0.2])) / 2  # without its positives it is as it is
    _, _, of_first = statistics.precision_interval(values[:1], left_out[:1], positives[:1])
    deviations = means - means.mean()
    error = math.sqrt(3 / 4 * (deviations**2).sum() + (1 / 12) / 2**2)
    middle = 0.4 - of_first / 2
    half = stats.t.ppf(0.975, (deviations**2).sum() ** 2 / (deviations**4).sum()) * error / (middle * (1 - middle))
    assert bias == pytest.approx(of_first / 2)
    assert [low, high] == pytest.approx([expit(logit(middle) - half), expit(logit(middle) + half)])


def test_the_interval_of_mean_precision_holds_the_truth():
    """At 225 images and 9% prevalence the percentiles of the bootstrap hold it in less than two thirds."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import coverage

    held = {"corrected": [], "percentiles": []}
    setting = coverage.Setting("small", patients=110, images=225, prevalences=(0.09,) * 8)
    for draw in range(60):
        rng = np.random.default_rng(draw)
        of_patient, targets, cluster = setting.simulate(rng)
        scores = setting.scores(rng, of_patient, targets, cluster)
        truth = setting.truth["auprc"].mean()
        _, left_out = statistics.bootstrap(scores, targets, cluster, statistics.leave_out(110))
        value = statistics.bootstrap(scores, targets, cluster, np.ones((110, 1), np.int32))[1][:, 0]
        positives = np.array([len(np.unique(cluster[t == 1])) for t in targets.T])
        low, high, _ = statistics.precision_interval(value, left_out, positives)
        held["corrected"].append(low <= truth <= high)
        _, drawn = statistics.bootstrap(scores, targets, cluster, statistics.draw(110, 200, draw))
        low, high = statistics.interval(drawn.mean(0))
        held["percentiles"].append(low <= truth <= high)
    assert np.mean(held["corrected"]) > 0.88 and np.mean(held["percentiles"]) < 0.7


def test_largest_gap_is_judged_against_the_largest_of_chance():
    """Of groups that differ by chance alone 5% reach p < .05, however many pairs there are; the truth is found."""
    rng, p, single = np.random.default_rng(0), [], []
    for _ in range(400):
        values = rng.normal(0.8, 0.02, 4)
        draws = values[:, None] + rng.normal(0, 0.02, (4, 400))
        p.append(statistics.largest_gap(values, draws)[0])
        low, _ = statistics.interval(draws[values.argmax()] - draws[values.argmin()])
        single.append(low > 0)
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.085
    assert np.mean(single) > 0.15  # the interval of the pair that was found furthest apart
    far = np.array([0.8, 0.8, 0.9])
    p, reach = statistics.largest_gap(far, far[:, None] + rng.normal(0, 0.01, (3, 999)))
    assert p == 1 / 1000 and reach == pytest.approx(stats.studentized_range.ppf(0.95, 3, np.inf) * 0.01, rel=0.1)
    assert statistics.largest_gap(far, np.full((3, 5), np.nan)) == (None, None)


def test_curves_pass_through_scikit_learns_points():
    scores, targets, cluster = clustered()
    ones = np.ones((40, 1), int)
    x, y, _ = roc_curve(targets, scores, drop_intermediate=False)
    ranking = statistics.Ranking(scores, targets, cluster)
    roc, _ = ranking.curves(ones, np.linspace(0, 1, 201))
    np.testing.assert_allclose(roc[:, 0], np.interp(np.linspace(0, 1, 201), x, y), atol=1e-12)
    _, precision = ranking.curves(ones, np.array([0.5]))
    best = [t for t in np.unique(scores) if (scores[targets == 1] >= t).mean() >= 0.5][-1]
    assert precision[0, 0] == pytest.approx(targets[scores >= best].mean())


def test_p_values_and_holm():
    assert statistics.normal_p(1.959963985, 1.0) == pytest.approx(0.05, abs=1e-9)
    assert statistics.normal_p(-2.575829304, 1.0) == pytest.approx(0.01, abs=1e-9)
    assert [statistics.normal_p(*x) for x in ((0.0, 0.0), (0.1, 0.0), (0.1, None))] == [1, 0, None]
    # Holm 1979: sorted p times 4, 3, 2, 1, never falling, at most 1.
    assert statistics.holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    draws = np.concatenate([np.full(30, -1.0), np.full(969, 1.0)])
    assert statistics.bootstrap_p(draws) == pytest.approx(2 * 31 / 1000)
    assert statistics.bootstrap_p(np.zeros(10)) == 1.0
    assert statistics.bootstrap_p(np.array([np.nan])) is None


# ------------------------------------------------------------------------------------- thresholds
def test_thresholds_are_the_best_of_all_by_exhaustive_search():
    scores, targets, _ = clustered()
    chosen = thresholds.choose(scores, targets, sensitivity=0.8, specificity=0.85)
    candidates = np.unique(scores)[::-1]
    sensitivity = np.array([(scores[targets == 1] >= t).mean() for t in candidates])
    specificity = np.array([(scores[targets == 0] < t).mean() for t in candidates])
    f1 = [f1_score(targets, scores >= t) for t in candidates]
    assert chosen["youden"] == candidates[np.argmax(sensitivity + specificity)]
    assert chosen["f1"] == candidates[np.argmax(f1)]
    assert chosen["sensitivity"] == candidates[sensitivity >= 0.8][0]
    assert chosen["specificity"] == candidates[specificity >= 0.85][-1]
    assert set(thresholds.choose(scores, np.ones(300)).values()) == {None}
    top = np.where(targets == 0, 1.0, scores)  # a negative at the top of all: no threshold reaches it
    assert thresholds.choose(top, targets, specificity=0.5)["specificity"] is None


def test_applied_threshold_counts_and_intervals_by_patient():
    scores, targets, cluster = clustered()
    targets[5] = np.nan
    found = thresholds.apply(0.7, scores, targets, cluster)
    known = ~np.isnan(targets)
    called, y = scores[known] >= 0.7, targets[known]
    tp, fp = (called & (y == 1)).sum(), (called & (y == 0)).sum()
    fn, tn = (~called & (y == 1)).sum(), (~called & (y == 0)).sum()
    assert tuple(found[k] for k in ("tp", "fp", "fn", "tn")) == (tp, fp, fn, tn)
    assert [found[r]["value"] for r in thresholds.RATES] == pytest.approx(
        [tp / (tp + fn), tn / (tn + fp), tp / (tp + fp), tn / (tn + fn)]
    )
    # By hand: the linearised variance between patients, and Wilson on p (1 - p) over it.
    p, n = tp / (tp + fn), tp + fn
    sums = [(((called & (y == 1))[cluster[known] == k]).sum(), (y[cluster[known] == k] == 1).sum()) for k in range(40)]
    sums = [(h, m) for h, m in sums if m]
    variance = len(sums) / (len(sums) - 1) * sum((h - p * m) ** 2 for h, m in sums) / n**2
    expected = wilson_score(p, min(n, p * (1 - p) / variance), stats.t.ppf(0.975, len(sums) - 1))
    assert (found["sensitivity"]["low"], found["sensitivity"]["high"]) == pytest.approx(expected, abs=1e-9)
    nothing = thresholds.apply(1.1, scores, targets, cluster)
    assert nothing["ppv"]["value"] is None and nothing["ppv"]["low"] is None
    assert nothing["sensitivity"]["value"] == 0 == nothing["sensitivity"]["low"] < nothing["sensitivity"]["high"]


def test_what_differs_from_the_fitting_is_noted():
    def notes(fitted_for, **changed):
        here = {"checkpoints_sha256": ["b", "a"], "ema": False, "tta": False, "dicom_recipe": "window"} | changed
        return applied.differences("--thresholds", "E", fitted_for, **here)

    then = {"checkpoints_sha256": ["a", "b"], "ema": False, "tta": False, "domain": "dicom window"}
    assert notes(then) == [] and notes(then, dicom_recipe=None) == []
    assert notes(then | {"ema": None}, ema=True) == []  # the checkpoint holds averaged weights alone
    for changed, text in (
        ({"checkpoints_sha256": ["a"]}, "was fitted for another checkpoint"),
        ({"ema": True}, "was fitted without --ema, this prediction is with it"),
        ({"tta": True}, "was fitted without --tta, this prediction is with it"),
        ({"dicom_recipe": "mimic_jpg"}, "on images of the kind dicom window, DICOM is read here by"),
    ):
        (note,) = notes(then, **changed)
        assert note.startswith("--thresholds E") and text in note
    assert notes({"checkpoints_sha256": None}) == [
        "--thresholds E does not record the checkpoint that it was fitted for"
    ]


# ------------------------------------------------------------------------------------ calibration
def test_platt_scaling_equals_logistic_regression():
    scores, targets, _ = clustered(images=600, ties=False)
    z = np.log(scores / (1 - scores))
    truth = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(z[:, None], targets)
    found = calibration.fit_platt(scores, targets)
    assert (found["slope"], found["intercept"]) == pytest.approx((truth.coef_[0, 0], truth.intercept_[0]), abs=1e-6)
    unknown = np.append(targets, np.nan)
    assert calibration.fit_platt(np.append(scores, 0.5), unknown) == pytest.approx(found)


def test_temperature_is_the_likeliest_on_a_grid_and_undoes_a_known_one():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (4000, 3))
    targets = (rng.random((4000, 3)) < 1 / (1 + np.exp(-z))).astype(float)
    overconfident = 1 / (1 + np.exp(-2.5 * z))
    found = calibration.fit_temperature(overconfident, targets)
    assert found == pytest.approx(2.5, rel=0.05)

    def loss(t):
        p = calibration.scale({"temperature": t}, "temperature", "", overconfident)
        return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum()

    assert loss(found) <= min(loss(t) for t in np.linspace(2, 3, 101)) + 1e-9
    assert calibration.fit_temperature(overconfident, 1 - targets) is None  # upside down: no temperature mends it


def test_scalings_that_have_no_maximum_are_none():
    p = np.array([0.1, 0.2, 0.8, 0.9])
    assert calibration.fit_platt(p, np.array([0.0, 0, 1, 1])) is None  # a threshold separates the classes
    assert calibration.fit_platt(p, np.ones(4)) is None
    assert calibration.fit_platt(np.full(4, 0.3), np.array([0.0, 1, 0, 1])) is None  # one probability for all


def test_measures_of_calibration():
    scores, targets, cluster = clustered(images=500, ties=False)
    weights = statistics.draw(40, 200, 0)
    found = calibration.measure(scores, targets, cluster, weights)
    assert found["brier"]["value"] == pytest.approx(brier_score_loss(targets, scores))
    drawn = []
    for b in range(200):
        rows = np.repeat(np.arange(500), weights[cluster, b])
        drawn.append(brier_score_loss(targets[rows], scores[rows]))
    assert (found["brier"]["low"], found["brier"]["high"]) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    ece, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in zip(edges[:-1], edges[1:]):
        here = (scores >= low) & (scores < high)
        if here.any():
            ece += here.mean() * abs(scores[here].mean() - targets[here].mean())
    assert found["ece"] == pytest.approx(ece)
    z = np.log(scores / (1 - scores))
    truth = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(z[:, None], targets)
    assert found["slope"]["value"] == pytest.approx(truth.coef_[0, 0], abs=1e-6)
    # With the slope held at 1 the mean probability becomes the share of positives: that defines the intercept.
    assert calibration.sigmoid(z + found["intercept"]["value"]).mean() == pytest.approx(targets.mean(), abs=1e-9)
    rate, mean = calibration_curve(targets, scores, n_bins=calibration.POINTS, strategy="quantile")
    assert found["curve"]["rate"] == pytest.approx(rate) and found["curve"]["probability"] == pytest.approx(mean)
    assert all(a <= b <= c for a, b, c in zip(*(found["curve"][key] for key in ("low", "rate", "high"))))
    one_class = calibration.measure(scores, np.ones(500), cluster, weights)
    assert one_class == {"left_out": "one class only"}


def test_clustered_error_of_a_mean_is_the_closed_form():
    """Intercept only: by the delta method the sandwich is the clustered error of the mean over p (1 - p)."""
    targets, cluster = np.array([1.0, 0, 1, 1, 0, 0, 0, 1]), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    design = np.ones((8, 1))
    c = calibration.fit_logistic(design, targets)
    assert c == pytest.approx([0.0], abs=1e-12)
    sums = np.array([targets[cluster == k].sum() - 1.0 for k in range(4)])
    expected = math.sqrt(4 / 3 * (sums**2).sum()) / (8 * 0.25)
    assert calibration.clustered_error(design, targets, c, cluster) == pytest.approx([expected])


def validation(slope=1.0, intercept=0.0, patients=150, images=600, labels=2, seed=0, prevalence=-1.0):
    """Probabilities whose logits are (z - intercept) / slope of well calibrated z, targets, patients."""
    rng = np.random.default_rng(seed)
    cluster = np.concatenate([np.arange(patients), rng.integers(0, patients, images - patients)])
    z = prevalence + rng.normal(0, 1.2, (images, labels)) + rng.normal(0, 0.5, patients)[cluster][:, None]
    targets = (rng.random((images, labels)) < calibration.sigmoid(z)).astype(float)
    return calibration.sigmoid((z - intercept) / slope), targets, cluster


def test_calibrated_takes_what_is_better_on_other_patients():
    p, y, cluster = validation(slope=0.5)  # logits twice too large: the temperature is 2
    fitted = calibration.fit(p, y, cluster, "ab")
    assert fitted["temperature"] == pytest.approx(2, rel=0.15)
    losses = fitted["chosen"]["a"]["log_loss"]
    assert losses["temperature"] < losses["none"]
    shifted, _, _ = validation(slope=1.0, intercept=2.0)  # far too low throughout: no temperature mends that
    fitted = calibration.fit(shifted, y, cluster, "ab")
    assert {c["method"] for c in fitted["chosen"].values()} == {"platt"}
    assert fitted["platt"]["a"]["intercept"] == pytest.approx(2, abs=0.5)
    good, _, _ = validation()
    rng = np.random.default_rng(1)
    fitted = calibration.fit(np.clip(good[:, :1], 0, 1), y[:, :1], cluster, "a")
    chosen = fitted["chosen"]["a"]
    best = min(chosen["log_loss"], key=chosen["log_loss"].get)
    assert chosen["method"] == best or chosen["log_loss"][chosen["method"]] == pytest.approx(
        chosen["log_loss"][best], rel=1e-3
    )
    # The cross-validated loss is that of patients that are in no fit: against scikit-learn on the same folds.
    fold = (np.random.default_rng(0).permutation(150) % calibration.FOLDS)[cluster]
    z, total = np.log(good[:, 0] / (1 - good[:, 0]))[:, None], 0.0
    for k in range(calibration.FOLDS):
        model = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(z[fold != k], y[fold != k, 0])
        total += log_loss(y[fold == k, 0], model.predict_proba(z[fold == k])[:, 1], normalize=False)
    assert chosen["log_loss"]["platt"] == pytest.approx(total / 600, rel=1e-6)
    noise = rng.random((600, 1)).clip(0.01, 0.99)
    assert calibration.fit(noise, y[:, :1], cluster, "a")["platt"]["a"] is None


def test_a_slope_from_few_patients_or_below_zero_is_not_applied():
    """Three positives of low score: Platt's slope is negative, and would reverse the label."""
    p, y, cluster = validation(labels=1)
    y[:] = 0
    y[np.argsort(p[:, 0])[[10, 20, 30]], 0] = 1
    assert calibration.fit_platt(p[:, 0], y[:, 0])["slope"] < -1
    fitted = calibration.fit(p, y, cluster, "a")
    assert fitted["platt"]["a"] is None and fitted["chosen"]["a"]["method"] != "platt"
    assert "3 positive patients in the validation split, at least 10 are needed" in fitted["chosen"]["a"]["why"]
    reversed_ = calibration.fit(*(lambda p, y, c: (1 - p, y, c))(*validation()), "ab")
    assert {c["method"] for c in reversed_["chosen"].values()} == {"none"} and reversed_["temperature"] is None
    assert "the slope is not clearly positive" in reversed_["chosen"]["a"]["why"]
    one = calibration.fit(p, np.zeros_like(y), cluster, "a", unit="image")
    assert "one class only" in one["chosen"]["a"]["why"]


def test_a_weak_label_is_never_reversed():
    """AUROC .57 and five positives: a third of the draws has a negative slope (issue 24)."""
    negative = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        y = np.zeros((200, 1))
        y[:5] = 1
        p = calibration.sigmoid(rng.normal(-3, 1, (200, 1)) + 0.25 * y)
        negative += calibration.fit_platt(p[:, 0], y[:, 0])["slope"] < 0
        assert calibration.fit(p, y, np.arange(200), "a")["platt"]["a"] is None
    assert negative > 5


# ------------------------------------------------------------------------------------------ groups
@pytest.mark.parametrize(
    "text, years",
    [
        ("45", 45), ("045Y", 45), ("018M", 1.5), ("720D", 1.97), ("52W", 1), ("72 months", 6), ("85 or more", 85),
        ("90+", 90), (">89", 89), ("3 Years", 3), ("36.5", 36.5), ("6 mo", 0.5),
        ("-3", None), ("412Y", None), ("35-45", None), ("unknown", None), ("<18", None), ("018X", None), ("", None),
    ],
)  # fmt: skip
def test_ages(text, years):
    found = groups.read_age(text)
    assert math.isnan(found) if years is None else found == pytest.approx(years, abs=0.01)
