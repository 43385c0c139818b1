"""Loss and metrics against scikit-learn and torch; the learning rate against its formula."""

import contextlib
from dataclasses import replace
from pathlib import Path

import common.torchvision_shim  # noqa: F401  (before torchvision)

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torchvision.ops import sigmoid_focal_loss

import utils_multilabel as multilabel
from analysis.metrics import Metric, per_label
from analysis.text import label_table
from common.distributed import World
from common.errors import UserError
from conftest import epochs
from training.lr_scheduler import Schedule
from training.state import Best
from training.tasks import TASKS


@pytest.fixture
def outputs():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(60, 4)).astype(np.float32)
    targets = (rng.random((60, 4)) < 0.4).astype(np.float32)
    targets[rng.random((60, 4)) < 0.2] = np.nan
    targets[:, 2] = np.where(np.isnan(targets[:, 2]), np.nan, 1)  # one class only
    targets[:, 3] = np.nan  # nothing known
    return logits, targets


def measure(logits, targets, names):
    return multilabel.multilabel_metrics(logits, 1 / (1 + np.exp(-logits.astype(float))), targets, names)


def test_metrics_mask_unknown_targets(outputs):
    logits, targets = outputs
    m = measure(logits, targets, "abcd")
    known = [~np.isnan(t) for t in targets.T]
    for k, name in enumerate("ab"):
        assert m["auc"][name] == pytest.approx(roc_auc_score(targets[known[k], k], logits[known[k], k]))
        expected = average_precision_score(targets[known[k], k], logits[known[k], k])
        assert m["average_precision"][name] == pytest.approx(expected)
    assert m["auc"]["c"] is m["auc"]["d"] is None
    assert m["mean_auc"] == pytest.approx((m["auc"]["a"] + m["auc"]["b"]) / 2)
    assert (m["positives"]["c"], m["negatives"]["c"], m["positives"]["d"]) == (known[2].sum(), 0, 0)
    everywhere = ~np.isnan(targets)
    p = 1 / (1 + np.exp(-logits[everywhere].astype(float)))
    t = targets[everywhere]
    assert m["loss"] == pytest.approx(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(), rel=1e-5)
    table = label_table(m, {"auc": "AUROC", "average_precision": "AP"}).splitlines()
    assert table[3].split() == ["c", "-", "-", str(known[2].sum()), "0"]
    assert table[-1] == "no AUROC (one class only), left out of the mean: c, d"
    assert table[-2].split() == ["mean", f"{m['mean_auc']:.4f}", f"{m['mean_average_precision']:.4f}"]


def test_no_label_with_an_auc_has_no_mean():
    m = measure(np.zeros((3, 1), np.float32), np.ones((3, 1), np.float32), "a")
    assert m["mean_auc"] is None


def test_unknown_targets_give_no_gradient(outputs):
    logits, targets = (torch.from_numpy(a) for a in outputs)
    logits.requires_grad_()
    multilabel.bce(logits, targets).backward()
    assert (logits.grad[targets.isnan()] == 0).all() and (logits.grad[~targets.isnan()] != 0).all()
    nothing = torch.full((2, 3), float("nan"))
    assert multilabel.bce(torch.ones(2, 3), nothing) == 0


def test_schedule():
    s = Schedule("cosine", total=110, warmup=10, peak=1.0, warmup_lr=0.1, min_lr=0.2)
    assert [s(0), s(5), s(10)] == pytest.approx([0.1, 0.55, 1.0])
    assert s(60) == pytest.approx(0.6) and s(110) == pytest.approx(0.2) and s(999) == pytest.approx(0.2)
    assert all(s(k) >= s(k + 1) for k in range(10, 110))
    linear = Schedule("linear", total=110, warmup=10, peak=1.0, warmup_lr=0.1, min_lr=0.2)
    assert linear(35) == pytest.approx(0.8)
    steps = Schedule("step", total=100, warmup=0, peak=1.0, warmup_lr=0, min_lr=0.05, decay_every=30)
    assert [steps(k) for k in (0, 29, 30, 60, 99)] == pytest.approx([1, 1, 0.1, 0.05, 0.05])


def test_an_update_is_the_mean_over_its_known_labels(run_main, monkeypatch):
    """Every known label of its two batches counts alike, and no other: of their mean logit the bias has a gradient
    whose sum is 1."""
    found, total_norm = [], torch.nn.utils.get_total_norm

    def mean_logit(logits, targets):
        known = ~targets.isnan()
        mean = logits.where(known, 0).sum() / known.sum()
        return mean - mean.detach() + 1

    def watched(gradients):
        found.append(next(g for g in gradients if g.shape == (14,)).sum().item())
        return total_norm(gradients)

    monkeypatch.setitem(multilabel.LOSSES, "mean_logit", mean_logit)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", watched)
    policy = dict(DATA__UNCERTAIN="ignore", DATA__MISSING="ignore")
    folder = run_main("--batch-size", 8, "--accumulation-steps", 2, TRAIN__LOSS="mean_logit", TRAIN__EPOCHS=1, **policy)
    assert len(found) > 3 and found == pytest.approx([1] * len(found))
    assert epochs(folder)[0]["train_loss"] == pytest.approx(1)


def test_losses_against_their_formulas():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 3, generator=generator, dtype=torch.float64) * 3
    targets = (torch.rand(40, 3, generator=generator) < 0.3).double()
    weight = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        multilabel.bce(logits, targets, weight), torch.nn.BCEWithLogitsLoss(pos_weight=weight)(logits, targets)
    )
    focal = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(multilabel.focal(logits, targets), focal)
    p = 1 / (1 + np.exp(-logits.numpy()))
    shifted = np.maximum(p - 0.05, 0)
    expected = -np.where(targets == 1, np.log(p), shifted**4 * np.log(1 - shifted)).mean()
    assert multilabel.asymmetric(logits, targets).item() == pytest.approx(expected)
    plain = dict(gamma_positive=0, gamma_negative=0, margin=0)
    torch.testing.assert_close(multilabel.asymmetric(logits, targets, **plain), multilabel.bce(logits, targets))


def test_smoothed_targets_by_hand():
    """-(1 - s/2) log p - s/2 log(1 - p) for a positive; nothing smoothed is the plain loss; unknown stays unknown."""
    logits, targets = torch.tensor([[0.7, -0.3, 2.0]]), torch.tensor([[1.0, 0.0, float("nan")]])
    p = torch.sigmoid(logits[0])
    expected = -(0.85 * p[0].log() + 0.15 * (1 - p[0]).log() + 0.15 * p[1].log() + 0.85 * (1 - p[1]).log()) / 2
    torch.testing.assert_close(multilabel.smooth_bce(logits, targets, smoothing=0.3), expected)
    torch.testing.assert_close(multilabel.smooth_bce(logits, targets, smoothing=0), multilabel.bce(logits, targets))


def test_options_of_a_loss_come_from_the_config():
    logits, targets = torch.tensor([[0.7, -0.3]]), torch.tensor([[1.0, 0.0]])
    loss = multilabel.build_loss("focal", {"gamma": 0})
    torch.testing.assert_close(loss(logits, targets), multilabel.bce(logits, targets))
    for name, options, message in (
        ("focall", {}, r"TRAIN.LOSS is 'focall'; choose one of bce.*\(did you mean focal\?\)"),
        ("focal", {"gama": 1}, r"TRAIN.LOSS_OPTIONS: focal has no 'gama' \(did you mean gamma\?\); .* are gamma$"),
        ("bce", {"gamma": 1}, "bce has no 'gamma'; it has no parameters"),
        ("bce", {"pos_weight": 1}, "bce has no 'pos_weight'"),
        ("focal", {"gamma": "2"}, "gamma is '2'; expected a number"),
        ("focal", {"gamma": True}, "gamma is True; expected a number"),
        ("focal", {"gamma": float("nan")}, "gamma is nan; expected a number"),
        ("focal", {"gamma": -2}, "gamma is -2; it must be at least 0"),
        ("asymmetric", {"gamma_positive": -0.1}, "gamma_positive is -0.1; it must be at least 0"),
        ("asymmetric", {"margin": 1.5}, "margin is 1.5; it must be between 0 and 1"),
        ("smooth_bce", {"smoothing": 5}, "smoothing is 5; it must be between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            multilabel.build_loss(name, options)


@pytest.mark.parametrize("name", multilabel.LOSSES)
def test_every_loss_masks_unknown_targets(name):
    loss, logits = multilabel.LOSSES[name], torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0.0, 1.0]).repeat(6, 2)
    masked = targets.clone()
    masked[:, 1] = torch.nan
    logits.requires_grad_()
    value = loss(logits, masked, torch.full((4,), 2.0))
    kept = [0, 2, 3]
    torch.testing.assert_close(value, loss(logits[:, kept], targets[:, kept], torch.full((3,), 2.0)))
    value.backward()
    assert (logits.grad[:, 1] == 0).all() and logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "name, options",
    [
        ("bce", {}),
        ("smooth_bce", {"smoothing": 1}),
        ("focal", {"gamma": 0}),
        ("focal", {"gamma": 0.01}),
        ("focal", {"gamma": 0.5}),
        ("focal", {"gamma": 8}),
        ("asymmetric", {"margin": 0}),
        ("asymmetric", {"margin": 1}),
        ("asymmetric", {"margin": 0, "gamma_negative": 0.05, "gamma_positive": 0.05}),
        ("asymmetric", {"margin": 0.3, "gamma_negative": 0.5, "gamma_positive": 2}),
        ("asymmetric", {"margin": 0, "gamma_negative": 0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_finite_whatever_the_logits(name, options, dtype):
    """Their gradients too; those of unknown labels are 0, even where the logit is infinite."""
    sizes = [0, 1e-4, 0.3, 7, 17, 20, 90, 104, 1000, 60000]
    logits = torch.tensor([*sizes, *(-x for x in sizes), torch.inf, -torch.inf, torch.nan], dtype=dtype)[:, None]
    logits = logits.repeat(1, 3).requires_grad_()
    targets = torch.tensor([[0.0, 1.0, torch.nan]]).repeat(len(logits), 1)
    targets[-3:] = torch.nan
    loss = multilabel.build_loss(name, options)
    value = loss(logits, targets)
    value.backward()
    assert value.isfinite() and value.dtype == torch.float32
    known = ~targets.isnan()
    assert logits.grad.isfinite().all() and (logits.grad[~known] == 0).all()
    torch.testing.assert_close(value, loss(logits[:-3, :2].detach(), targets[:-3, :2]))


def test_an_asymmetric_loss_without_a_margin_by_its_formula():
    """In double precision, where 1 - p is never 0 for these logits."""
    x = np.array([-30.0, -5, 0, 5, 20, 30])
    p, q = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    loss = multilabel.build_loss("asymmetric", {"margin": 0, "gamma_negative": 2})
    found = [loss(torch.tensor([[v]]), torch.zeros(1, 1)).item() for v in x]
    assert found == pytest.approx(-(p**2) * np.log(q), rel=1e-5)


def test_a_loss_is_computed_in_float32_within_autocast():
    seen = []

    def loss(logits, targets):
        seen.append((logits.dtype, (logits @ logits.T).dtype))
        return logits.mean()

    with torch.autocast("cpu", torch.bfloat16):
        multilabel.Criterion("own", loss, {}, {})(torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2))
    assert seen == [(torch.float32, torch.float32)]


@pytest.mark.parametrize("higher, better, worse", [(True, 0.6, 0.4), (False, 0.4, 0.6)])
def test_the_best_score_has_a_direction(higher, better, worse):
    best = Best("max_accuracy", Metric("x", "X", None, higher_is_better=higher), "", Path(), None)
    for epoch, (score, taken) in enumerate([(None, False), (0.5, True), (0.5, False), (worse, False), (better, True)]):
        assert best.take(score, epoch) == taken
    assert not best.take(None, 5) and (best.value, best.epoch) == (better, 4)


def test_the_metric_that_chooses_is_named():
    auc, brier = Metric("auc", "A", None), Metric("brier", "B", None)

    def choose(best_by, *rows):
        return replace(TASKS["multilabel"], metrics=lambda: rows).best_metric(best_by)

    assert choose("mean_brier", auc, brier) is brier
    assert choose("mean_auc", brier, auc) is auc  # in any order
    assert choose("mean_auc", brier) is brier  # the default, where its row is gone
    assert TASKS["single_label"].best_metric("mean_auc").key == "acc1"
    assert TASKS["single_label"].best_metric("acc5").key == "acc5"
    with pytest.raises(
        UserError, match=r"TRAIN.BEST_BY is 'mean_brie'; .* mean_auc, mean_brier \(did you mean mean_brier"
    ):
        choose("mean_brie", auc, brier)


def test_a_value_that_is_not_finite_is_none():
    assert per_label(lambda t, p: float("nan"), np.ones((2, 1)), np.array([[0.0], [1.0]])) == [None]


def test_positive_weights_are_negatives_by_positives_and_capped():
    targets = np.array([[1, 0, 1, 0.7], [0, 0, 1, 0], [0, 0, np.nan, 0], [0, 0, 0, 1]], np.float32)
    positives, negatives, known = multilabel.count_labels(targets, np.ones(4))
    assert (positives.tolist(), negatives.tolist(), known.tolist()) == ([1, 0, 2, 1], [3, 4, 1, 2], [4, 4, 3, 4])
    sampled = multilabel.count_labels(targets, np.array([0, 2, 1, 0.5]))
    assert [c.tolist() for c in sampled] == [[0, 0, 2, 0.5], [3.5, 3.5, 0.5, 3], [3.5, 3.5, 2.5, 3.5]]
    assert multilabel.pos_weights(positives, negatives, 10.0).tolist() == [3, 4, 0.5, 2]
    assert multilabel.pos_weights(positives, negatives, 2.5).tolist() == [2.5, 2.5, 0.5, 2]
    assert multilabel.pos_weights(positives, negatives, 0.0) is None


def test_validation_and_test_give_what_is_promised_and_each_source():
    """Of a model that returns its input; three images of one source, five of another, in two batches."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(8, 2)).astype(np.float32))
    targets = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 1], [1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.float32)
    targets[5, 1] = torch.nan
    rows = torch.arange(8)
    loader = [(logits[part], targets[part], rows[part]) for part in (slice(0, 6), slice(6, 8))]
    world, names = World(0, 1, torch.device("cpu")), ("a", "b")
    identity = torch.nn.Identity()
    mean, loss, auc = multilabel.validate_multilabel(identity, loader, world, contextlib.nullcontext, label_names=names)
    sources = np.array(["x"] * 3 + ["y"] * 5)
    found = multilabel.evaluate_test_set(
        identity, loader, world, contextlib.nullcontext, label_names=names, sources=sources
    )
    assert auc["a"] == roc_auc_score(targets[:, 0], logits[:, 0]) and list(auc) == ["a", "b"]
    assert (mean, loss, auc) == (found["mean_auc"], found["loss"], found["auc"]) and mean == np.mean(list(auc.values()))
    assert list(found["by_source"]) == ["x", "y"] and found["by_source"]["y"]["images"] == 5
    assert found["by_source"]["y"]["auc"]["a"] == roc_auc_score(targets[3:, 0], logits[3:, 0])
    known = ~targets[3:, 1].isnan()
    assert found["by_source"]["y"]["auc"]["b"] == roc_auc_score(targets[3:, 1][known], logits[3:, 1][known])


def test_ranking_metrics_take_logits_whose_probabilities_are_all_one():
    logits = np.linspace(39.9, 43, 40, dtype=np.float32)[:, None]
    targets = (np.arange(40) >= 25).astype(np.float32)[:, None]
    found = measure(logits, targets, ["a"])
    assert found["auc"]["a"] == found["average_precision"]["a"] == 1
