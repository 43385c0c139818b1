"""What the README's table "to add" promises: each kind of thing is added from outside, in one place, and trains."""

import json
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

import config as config_module
import models
import report
import utils_multilabel
from analysis import figures
from analysis.metrics import METRICS, Metric
from common.errors import UserError
from config import Knob
from conftest import epochs
from dataset import labels, mixing
from dataset.build import build_datasets
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


def test_a_loss_that_asks_for_counts_and_epochs(run_main, monkeypatch, tree):
    seen = []

    def counting(logits, targets, positives, known, epoch, epochs, pos_weight, scale=1.0):
        seen.append((positives, known, epoch, epochs, pos_weight))
        return scale * F.binary_cross_entropy_with_logits(
            logits, targets.nan_to_num(0.0), weight=(~targets.isnan()).float()
        )

    monkeypatch.setitem(utils_multilabel.LOSSES, "counting", counting)
    policy = dict(DATA__UNCERTAIN="ignore", DATA__MISSING="ignore")
    folder = run_main(TRAIN__LOSS="counting", TRAIN__POS_WEIGHT_CAP=3, **policy)
    content = config_module.yaml.safe_load((folder / "config.json").read_text())
    (train,) = build_datasets(config_module.from_dict(content, "test"), "train")
    assert len(seen) > 4 and [s[2] for s in seen] == sorted(s[2] for s in seen) and {s[2] for s in seen} == {0, 1}
    positives, known, _, count, weight = seen[-1]
    assert count == 2 and positives.tolist() == (train.targets == 1).sum(0).tolist()
    assert known.tolist() == (~np.isnan(train.targets)).sum(0).tolist()
    expected = np.clip((train.targets == 0).sum(0) / np.maximum((train.targets == 1).sum(0), 1), 1 / 3, 3)
    assert weight.tolist() == pytest.approx(expected.tolist())


class Learned(nn.Module):
    """The cross-entropy at a temperature per label that is learned."""

    def __init__(self, known, start=1.0):
        super().__init__()
        self.temperature = nn.Parameter(torch.full_like(known, start))

    def forward(self, logits, targets, epoch):
        return F.binary_cross_entropy_with_logits(logits / self.temperature, targets)


def test_a_loss_with_parameters_is_trained_saved_and_resumed(run_main, monkeypatch):
    monkeypatch.setitem(utils_multilabel.LOSSES, "learned", Learned)
    opts = dict(TRAIN__LOSS="learned", TRAIN__LOSS_OPTIONS="{start: 1.5}", DATA__LIMIT=64)
    folder = run_main(**opts)
    first, last = (checkpoint.read(folder / f"ckpt_epoch_{k}.pth") for k in (1, 2))
    temperatures = [state["loss"]["learned"]["loss.temperature"] for state in (first, last)]
    assert (temperatures[0] != 1.5).all() and (temperatures[1] != temperatures[0]).all()
    other = checkpoint.read(run_main("--resume", folder / "ckpt_epoch_1.pth", out="b", **opts) / checkpoint.LAST)
    assert torch.equal(other["loss"]["learned"]["loss.temperature"], temperatures[1])
    moments = [state["optimizer"]["state"] for state in (last, other)]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(moments[0][k]["exp_avg"], moments[1][k]["exp_avg"]) for k in moments[0])
    # Under another loss its parameters and their moments are left behind.
    run_main("--resume", folder / "ckpt_epoch_1.pth", out="c", DATA__LIMIT=64)


@pytest.mark.parametrize(
    "loss, options, message",
    [
        (lambda logits, targets: logits - targets, {}, r"own returns a tensor of shape \(16, 14\); it must return one"),
        (lambda logits, targets, weight: logits.mean(), {}, r"LOSS_OPTIONS: own needs weight, such as \{weight: 1.0\}"),
        (lambda logits, targets: logits.mean(), {"TRAIN__POS_WEIGHT_CAP": 2}, "LOSS own has no parameter pos_weight"),
        (Learned, {"TRAIN__LOSS_OPTIONS": "{stop: 1}"}, "own has no 'stop'; its parameters are start"),
    ],
)
def test_a_loss_that_keeps_no_contract(run_main, monkeypatch, loss, options, message):
    monkeypatch.setitem(utils_multilabel.LOSSES, "own", loss)
    with pytest.raises(UserError, match=message):
        run_main(TRAIN__LOSS="own", TRAIN__EPOCHS=1, **options)


BRIER = Metric("brier", "Brier", lambda t, p: np.mean((t - p) ** 2), higher_is_better=False)


def test_a_metric_of_which_less_is_better_chooses_the_best(run_main, rows, monkeypatch, capsys):
    """And reaches every table and figure."""
    rows.insert(0, BRIER)
    falls = iter([0.3, 0.1, 0.2, 0.3, 0.2, 0.1])  # of the weights and of the EMA, by turns
    validate = utils_multilabel.label_metrics

    def scripted(*arguments):
        return validate(*arguments) | {"mean_brier": next(falls)}

    monkeypatch.setattr(utils_multilabel, "label_metrics", scripted)
    folder = run_main(TRAIN__BEST_BY="mean_brier", TRAIN__EPOCHS=3, DATA__LIMIT=64)
    monkeypatch.undo()
    lines, state = epochs(folder), checkpoint.read(folder / checkpoint.BEST)
    assert [line["best_mean_brier"] for line in lines] == [0.3, 0.2, 0.2]
    assert [line["ema"]["best"] for line in lines] == [0.1, 0.1, 0.1]
    assert (state["epoch"], state["max_accuracy"], state["best_by"]) == (2, 0.2, "mean_brier")
    assert json.loads((folder / "config.json").read_text())["TRAIN"]["BEST_BY"] == "mean_brier"
    log = (folder / "log_rank0.txt").read_text()
    assert "chosen by mean_brier, lower is better" in log and "finished: best mean_brier" in log

    # Under another metric the best restarts.
    run_main(TRAIN__EPOCHS=4, DATA__LIMIT=64)
    assert (
        "by mean_brier, now TRAIN.BEST_BY is mean_auc, so best_ckpt.pth restarts (best before: mean_brier 0.2000)"
        in (folder / "log_rank0.txt").read_text()
    )
    line = epochs(folder)[-1]
    assert line["best_mean_auc"] == line["mean_auc"] and checkpoint.read(folder / checkpoint.BEST)["epoch"] == 4

    run_main("--eval")
    run_main("--eval", "--ema")
    capsys.readouterr()
    found, ema = sorted(folder.parents[1].glob("results/evaluation_*"))
    report.main(
        [str(found), "--ensemble", str(ema), "--output", str(found / "both"), "--resamples", "200", "--no-images"]
    )
    one, other = (pd.read_csv(folder / "predictions.csv") for folder in (found, ema))
    mean = (one["Edema_probability"] + other["Edema_probability"]) / 2
    for path, p in ((found, one["Edema_probability"]), (found / "both", mean)):
        edema = np.mean((one["Edema_target"] - p) ** 2)
        assert json.loads((path / "metrics.json").read_text())["brier"]["Edema"] == pytest.approx(edema, abs=1e-6)
    written = json.loads((found / "both" / "report.json").read_text())
    assert written["metrics"]["brier"]["labels"]["Edema"] == pytest.approx(edema, abs=1e-6)
    assert "Brier (lower is better)" in (found / "both" / "report.html").read_text()
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    figures.plot_training(folder, rows)
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert "validation mean_brier\nlower is better" in titles
    assert "validation mean_auc\nhigher is better, chooses the best" in titles


def test_a_metric_less(run_main, rows, capsys):
    """Without the row of the default the first row that is left chooses, and everything is written."""
    del rows[0]
    folder = run_main(TRAIN__EPOCHS=1)
    (line,) = epochs(folder)
    assert line["best_mean_average_precision"] == line["mean_average_precision"] and "mean_auc" not in line
    run_main("--eval")
    found = next(folder.parents[1].glob("results/evaluation_*"))
    report.main([str(found), "--resamples", "200", "--no-images"])
    assert "mean_auc" not in json.loads((found / "metrics.json").read_text()) and (found / "report.html").is_file()
    with pytest.raises(UserError, match="TRAIN.BEST_BY is 'mean_auk'; choose one of mean_average_precision"):
        run_main(TRAIN__BEST_BY="mean_auk", out="b")


def test_a_mixing(run_main, monkeypatch):
    """Its row mixes images and targets, until AUG.MIXUP_OFF_EPOCH."""
    seen = []

    def build(config):
        return (lambda images, targets: (seen.append(mix.epoch) or images.flip(0), targets.flip(0))), 1.0

    monkeypatch.setattr(mixing, "MIXINGS", [*mixing.MIXINGS, build])
    mix = mixing.build_mixing(
        config_module.from_dict({"AUG": {"MIXUP": 0.0, "CUTMIX": 0.0, "MIXUP_OFF_EPOCH": 2}}, "test")
    )
    images, targets = torch.arange(3.0), torch.arange(3.0)
    for mix.epoch in range(4):
        assert mix(images, targets)[0].tolist() == ([2, 1, 0] if mix.epoch < 2 else [0, 1, 2])
    assert seen == [0, 1]
    mix = types.SimpleNamespace(epoch="run")
    run = run_main(AUG__MIXUP_OFF_EPOCH=1, DATA__LIMIT=64)
    assert "has no effect" not in (run / "log_rank0.txt").read_text()
    updates = seen.count("run")
    run_main(out="b", DATA__LIMIT=64)
    assert seen.count("run") - updates == 2 * updates > 4


def test_a_metric(run_main, rows, capsys):
    """Its row alone brings it into metrics.json, metrics.jsonl and the table."""
    rows.append(Metric("gini", "Gini", lambda t, p: 2 * roc_auc_score(t, p) - 1))
    run_main(TRAIN__EPOCHS=1)
    folder = run_main("--eval")
    metrics = json.loads(next(folder.parents[1].glob("results/evaluation_*/metrics.json")).read_text())
    assert metrics["mean_gini"] == pytest.approx(2 * metrics["mean_auc"] - 1)
    assert metrics["gini"]["Edema"] == pytest.approx(2 * metrics["auc"]["Edema"] - 1)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(line[:2] == ["label", "AUROC"] and "Gini" in line for line in table)
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
    monkeypatch.setattr("training.step.build_optimizer", lambda c, *m: used.append(c.TRAIN.GRAD_FACTOR) or build(c, *m))
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
