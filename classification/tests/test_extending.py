"""What the README's table "to add" promises: each kind of thing is added from outside, in one place, and trains."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

import config as config_module
import models
import utils_multilabel
from analysis.metrics import METRICS, Metric
from common.errors import UserError
from config import Knob
from conftest import epochs
from dataset import labels
from training import checkpoint, optimizer

BACKBONE = """
import torch
from torch import nn


class Small(nn.Module):
    classifier, uses = "fc", frozenset({"MODEL.DROP_RATE"})

    def __init__(self, classes, drop):
        super().__init__()
        self.stem, self.drop, self.fc = nn.Conv2d(3, 8, 7, stride=4), nn.Dropout(drop), nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.drop(self.stem(x).relu().mean((2, 3))))


def build(config):
    return Small(config.MODEL.NUM_CLASSES, config.MODEL.DROP_RATE)
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A backbone of the name `small`, a file beside those in models/."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "small.py").write_text(BACKBONE)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "more")])
    yield
    sys.modules.pop("models.small", None)


@pytest.fixture
def rows():
    """The table of metrics, which a test may change."""
    before = METRICS[:]
    yield METRICS
    METRICS[:] = before


def test_a_loss(run_main, monkeypatch):
    given = []

    def squared(logits, targets, pos_weight=None, scale=1.0):
        given.append(scale)
        return scale * F.mse_loss(logits.sigmoid(), targets)

    monkeypatch.setitem(utils_multilabel.LOSSES, "squared", squared)
    folder = run_main(TRAIN__LOSS="squared", TRAIN__LOSS_OPTIONS="{scale: 0.5}", TRAIN__EPOCHS=1)
    assert set(given) == {0.5} and 0 < epochs(folder)[0]["train_loss"] < 0.5
    with pytest.raises(UserError, match=r"squared has no 'skale' \(did you mean scale\?\)"):
        run_main(TRAIN__LOSS="squared", TRAIN__LOSS_OPTIONS="{skale: 0.5}", out="other")


def test_a_metric(run_main, rows, capsys):
    """Its row alone brings it into metrics.json, metrics.jsonl and the table."""
    rows.append(Metric("gini", "Gini", lambda t, p: 2 * roc_auc_score(t, p) - 1))
    run_main(TRAIN__EPOCHS=1)
    folder = run_main("--eval")
    metrics = json.loads(next(folder.parents[1].glob("results/evaluation_*/metrics.json")).read_text())
    assert metrics["mean_gini"] == pytest.approx(2 * metrics["mean_auc"] - 1)
    assert metrics["gini"]["Edema"] == pytest.approx(2 * metrics["auc"]["Edema"] - 1)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(line[:4] == ["label", "AUROC", "AP", "Gini"] for line in table)
    (line,) = epochs(folder)
    assert line["mean_gini"] == pytest.approx(2 * line["mean_auc"] - 1) and "auc" in line and "gini" not in line


def test_a_backbone(run_main, small, tmp_path):
    folder = run_main(MODEL__TYPE="small", MODEL__NAME="tiny", TRAIN__EPOCHS=1, TRAIN__USE_CHECKPOINT=True,
                      TRAIN__LR_LAYER_DECAY=True, MODEL__DROP_RATE=0.1)  # fmt: skip
    log = (folder / "log_rank0.txt").read_text()
    for key in ("MODEL.DROP_PATH_RATE 0.2", "TRAIN.USE_CHECKPOINT True", "TRAIN.LR_LAYER_DECAY True"):
        assert f"WARNING {key} has no effect: the backbone MODEL.TYPE small has no such thing" in log
    assert "MODEL.DROP_RATE" not in log

    # Foreign weights: a classifier of another size is replaced under the name that the model gives it.
    weights = checkpoint.read(folder / checkpoint.LAST)["model"]
    weights["fc.weight"], weights["fc.bias"] = torch.ones(1000, 8), torch.ones(1000)
    torch.save(weights, tmp_path / "w.pth")
    other = run_main("--pretrained", tmp_path / "w.pth", MODEL__TYPE="small", MODEL__NAME="tiny", out="b",
                     TRAIN__EPOCHS=1)  # fmt: skip
    assert "replaced: fc.bias, fc.weight" in (other / "log_rank0.txt").read_text()


def test_logits_are_float32_for_every_backbone(tiny, small):
    opts = ["MODEL.TYPE", "small", "AMP_OPT_LEVEL", "O1"]
    config = config_module.get_config(config_module.parse_args(["--cfg", str(tiny), "--opts", *opts]))
    model = models.build_model(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert len(optimizer.parameter_groups(model, config)) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (('classifier, uses = "fc", ', "uses = "), "returns a model without `classifier`"),
        (("classifier, uses = ", "classifier, other = "), "returns a model without `uses`"),
        (('"fc", frozenset', '"stem", frozenset'), "its classifier 'stem' is Conv2d"),
        (('"fc", frozenset', '"head", frozenset'), "its classifier 'head' is None"),
        (("return Small(config.MODEL.NUM_CLASSES", "return Small(3"), "expected an nn.Linear with 14 outputs"),
        (("def build(", "def make("), "MODEL.TYPE is 'small'"),
    ],
)
def test_a_backbone_that_keeps_no_contract(run_main, small, change, message):
    path = models.__path__[-1] + "/small.py"
    with open(path, "w") as file:
        file.write(BACKBONE.replace(*change))
    with pytest.raises(UserError, match=message):
        run_main(MODEL__TYPE="small")


def test_a_knob(run_main, monkeypatch):
    """A row and its use."""
    row = Knob(1.0, "what the gradients are multiplied by", config_module.at_least(0))
    monkeypatch.setitem(config_module.KNOBS, "TRAIN.GRAD_FACTOR", row)
    used = []
    build = optimizer.build_optimizer
    monkeypatch.setattr("main.build_optimizer", lambda c, *m: used.append(c.TRAIN.GRAD_FACTOR) or build(c, *m))
    folder = run_main(TRAIN__GRAD_FACTOR=0.5, TRAIN__EPOCHS=1)
    assert used == [0.5] and json.loads((folder / "config.json").read_text())["TRAIN"]["GRAD_FACTOR"] == 0.5
    with pytest.raises(UserError, match="TRAIN.GRAD_FACTOR is -1.0; it must be at least 0"):
        run_main(TRAIN__GRAD_FACTOR=-1)


def test_a_label_policy(run_main, monkeypatch):
    monkeypatch.setitem(labels.POLICIES, "half", (0.5, 0.5))
    raw = np.array([[1.0, 0.0, -1.0, np.nan]], np.float32).T
    policy = {"uncertain": "half", "missing": "ignore"}
    assert np.array_equal(labels.apply_policy(raw, ("A",), **policy)[:, 0], [1, 0, 0.5, np.nan], equal_nan=True)
    folder = run_main(DATA__UNCERTAIN="half", TRAIN__EPOCHS=1)
    assert np.isfinite(epochs(folder)[0]["train_loss"])
