"""Loss and metrics against scikit-learn and torch; the learning rate against its formula."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import utils_multilabel as multilabel
from lr_scheduler import Schedule


@pytest.fixture
def outputs():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(60, 4)).astype(np.float32)
    targets = (rng.random((60, 4)) < 0.4).astype(np.float32)
    targets[rng.random((60, 4)) < 0.2] = np.nan
    targets[:, 2] = np.where(np.isnan(targets[:, 2]), np.nan, 1)  # one class only
    targets[:, 3] = np.nan  # nothing known
    return logits, targets


def test_metrics_mask_unknown_targets(outputs):
    logits, targets = outputs
    m = multilabel.multilabel_metrics(logits, targets, "abcd", multilabel.bce)
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
    table = multilabel.auc_table(m).splitlines()
    assert table[3].split() == ["c", "-", "-", str(known[2].sum()), "0"]
    assert table[-1] == "no AUROC (one class only), left out of the mean: c, d"
    assert table[-2].split() == ["mean", f"{m['mean_auc']:.4f}", f"{m['mean_average_precision']:.4f}"]


def test_no_label_with_an_auc_has_no_mean():
    m = multilabel.multilabel_metrics(np.zeros((3, 1), np.float32), np.ones((3, 1), np.float32), "a", multilabel.bce)
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
