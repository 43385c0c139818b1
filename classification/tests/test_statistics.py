"""Intervals, clustered variance, thresholds and calibration against truths of their own."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score, roc_curve

from analysis import applied, calibration, statistics, thresholds


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
    assert statistics.interval(auroc[0]) == (1.0, 1.0)
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
    weights = statistics.draw(40, 300, 0)
    found = thresholds.apply(0.6, scores, targets, cluster, weights, statistics.interval)
    known = ~np.isnan(targets)

    def rates(rows):
        called, y = scores[rows] >= 0.6, targets[rows]
        tp, fp = (called & (y == 1)).sum(), (called & (y == 0)).sum()
        fn, tn = (~called & (y == 1)).sum(), (~called & (y == 0)).sum()
        return (tp, fp, fn, tn), (tp / (tp + fn), tn / (tn + fp), tp / (tp + fp), tn / (tn + fn))

    counts, values = rates(known)
    assert tuple(found[k] for k in ("tp", "fp", "fn", "tn")) == counts
    assert [found[r]["value"] for r in thresholds.RATES] == pytest.approx(values)
    resampled = [rates(np.repeat(np.flatnonzero(known), weights[cluster[known], b]))[1] for b in range(300)]
    for rate, draws in zip(thresholds.RATES, np.transpose(resampled)):
        assert (found[rate]["low"], found[rate]["high"]) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
    nothing = thresholds.apply(1.1, scores, targets, cluster, weights, statistics.interval)
    assert nothing["ppv"]["value"] is None and nothing["sensitivity"]["value"] == 0


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
        p = calibration.apply_temperature(overconfident, t)
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
    found = calibration.measure(scores, targets, cluster, weights, statistics.interval)
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
    one_class = calibration.measure(scores, np.ones(500), cluster, weights, statistics.interval)
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
