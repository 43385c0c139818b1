"""The loop: what a run leaves behind, exact resume, ranks, precision, and clear errors."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import config as config_module
import main
import utils_multilabel as multilabel
from common import distributed, files
from common.errors import UserError, run_command
from conftest import ROOT, edit_csv, epochs, signalled
from dataset.build import Loader
from dataset.labels import LABELS
from training import checkpoint, faults, state, testing
from training import compiling as compiling_module
from training import run as run_module
from training.step import Step
from training.tasks import TASKS

LOG = logging.getLogger("test")


def same(a, b):
    """Equal to the bit, tensors in nested containers included."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    """Two runs ended alike: weights, EMA, moments, metrics."""
    x, y = (checkpoint.read(folder / checkpoint.LAST) for folder in (a, b))
    for key in ("model", "model_ema", "optimizer", "epoch", "max_accuracy", "max_ema_accuracy", "rng", "amp"):
        assert same(x[key], y[key]), key
    assert epochs(a) == epochs(b)
    for name in (checkpoint.BEST, checkpoint.EMA_BEST):
        x, y = (checkpoint.read(folder / name) for folder in (a, b))
        assert same(x["model"], y["model"]) and x["epoch"] == y["epoch"], name


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """A run of three epochs without interruption, and its evaluation."""
    from conftest import TINY

    base = tmp_path_factory.mktemp("finished")
    (base / "tiny.yaml").write_text(TINY)
    argv = ["--cfg", str(base / "tiny.yaml"), "--data-path", str(tree), "--output", str(base / "out")]
    opts = ["--opts", "TRAIN.EPOCHS", "3", "SAVE_FREQ", "2", "RESULTS", str(base / "results")]
    assert main.main([*argv, *opts]) == 0
    assert main.main([*argv, "--eval", *opts]) == 0
    return base


def test_a_run_leaves_what_is_promised(finished):
    run = finished / "out" / "tiny" / "default"
    expected = {
        "best_ckpt.pth", "ema_best_ckpt.pth", "ckpt_epoch_2.pth", "ckpt_epoch_3.pth", "last_ckpt.pth",
        "last_ckpt.previous.pth", "config.json", "log_rank0.txt", "metrics.jsonl", "training.png", ".lock",
    }  # fmt: skip
    assert {p.name for p in run.iterdir()} == expected
    assert json.loads((run / "config.json").read_text())["TRAIN"]["EPOCHS"] == 3
    lines = epochs(run)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for k, line in enumerate(lines):
        assert {"train_loss", "lr", "grad_norm", "val_loss", "mean_auc", "best_mean_auc", "auc", "ema"} <= line.keys()
        assert list(line["auc"]) == list(LABELS)
        defined = [v for v in line["auc"].values() if v is not None]
        assert line["mean_auc"] == pytest.approx(np.mean(defined))
        assert line["best_mean_auc"] == max(e["mean_auc"] for e in lines[: k + 1])
    state = torch.load(run / "best_ckpt.pth", weights_only=True)
    promised = {"model", "optimizer", "lr_scheduler", "epoch", "max_accuracy", "config", "amp", "model_ema"}
    assert promised <= state.keys()
    best = max(lines, key=lambda line: line["mean_auc"])
    assert (state["epoch"], state["max_accuracy"]) == (best["epoch"], best["mean_auc"])
    ema = checkpoint.read(run / "ema_best_ckpt.pth")
    ema_best = max(lines, key=lambda line: line["ema"]["mean_auc"])
    assert (ema["epoch"], ema["max_ema_accuracy"]) == (ema_best["epoch"], ema_best["ema"]["mean_auc"])
    assert same(ema["model"], ema["model_ema"]) and not same(ema["model"], state["model"])


def test_the_evaluation_agrees_with_its_own_predictions(finished, tree):
    (folder,) = (finished / "results").glob("evaluation_*")
    assert {p.name for p in folder.iterdir()} == {
        "metrics.json", "predictions.csv", "predictions_validate.csv", "metrics.jsonl",
    }  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = pd.read_csv(folder / "predictions.csv")
    split = pd.read_csv(next(tree.glob("*-split.csv.gz")))
    test = split[split.split == "test"]
    assert set(rows.dicom_id) == set(test.dicom_id) and len(rows) == len(test) == metrics["images"]
    truth = rows[["dicom_id", "study_id"]].merge(pd.read_csv(next(tree.glob("*-chexpert.csv.gz"))), on="study_id")
    truth = truth.set_index("dicom_id").loc[rows.dicom_id]
    values = []
    for name in LABELS:
        target = (truth[name] == 1).to_numpy(float)
        np.testing.assert_array_equal(rows[f"{name}_target"], target)
        if len(np.unique(target)) == 2:
            values.append(roc_auc_score(target, rows[f"{name}_probability"]))
            assert metrics["auc"][name] == pytest.approx(values[-1], abs=1e-6)
        else:
            assert metrics["auc"][name] is None
        assert metrics["positives"][name] + metrics["negatives"][name] == len(rows)
    assert metrics["mean_auc"] == pytest.approx(np.mean(values), abs=1e-6)
    held_out = pd.read_csv(folder / "predictions_validate.csv")
    assert set(held_out.dicom_id) == set(split[split.split == "validate"].dicom_id)
    p = np.clip(rows[[f"{n}_probability" for n in LABELS]].to_numpy(), 1e-7, 1 - 1e-7)
    t = rows[[f"{n}_target" for n in LABELS]].to_numpy()
    assert metrics["loss"] == pytest.approx(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(), rel=1e-4)


# ---------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("at", [1, 12, 18], ids=["first update", "within epoch 2", "end of epoch 2"])
def test_interrupted_and_resumed_equals_uninterrupted(finished, run_main, monkeypatch, at):
    """A signal after update `at` (of 9 an epoch) stops the run there; the same command ends bit-identical."""
    whole = finished / "out" / "tiny" / "default"
    steps = signalled(monkeypatch, torch.optim.AdamW, "step", at, signal.SIGUSR1)
    folder = run_main(TRAIN__EPOCHS=3, SAVE_FREQ=2)
    assert run_main.status == signal.SIGUSR1 and len(steps) == at
    run_main(TRAIN__EPOCHS=3, SAVE_FREQ=2)
    assert run_main.status == 0
    assert_same_run(folder, whole)


def test_float16_resumes_with_its_scale(run_main, monkeypatch):
    """The scale grows every third update: resumed from the start it would be another."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, growth_interval=3))
    options = dict(TRAIN__EPOCHS=1, AMP_OPT_LEVEL="O1", AMP_DTYPE="float16")
    whole = run_main(out="whole", **options)
    assert checkpoint.read(whole / "last_ckpt.pth")["amp"]["scale"] == 2.0 ** (16 + 9 // 3)
    signalled(monkeypatch, torch.optim.AdamW, "step", 5)
    folder = run_main(**options)
    run_main(**options)
    assert_same_run(folder, whole)


def test_the_ema_of_buffers_is_that_of_their_values(run_main, monkeypatch):
    seen, step = [], Step.__call__
    name = "conv_head.1.0.running_var"

    def looked_at(self, *a, **k):
        seen.append(seen or self.model.state_dict()[name].double().clone())
        result = step(self, *a, **k)
        seen.append(self.model.state_dict()[name].double().clone())
        return result

    monkeypatch.setattr(Step, "__call__", looked_at)
    folder = run_main(TRAIN__EPOCHS=1)
    expected = seen[0]
    for value in seen[1::2]:
        expected = 0.9 * expected + 0.1 * value
    found = checkpoint.read(folder / "last_ckpt.pth")["model_ema"][name]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert not torch.equal(found, checkpoint.read(folder / "last_ckpt.pth")["model"][name])


def test_a_checkpoint_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events, flush, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (events.append(os.readlink(f"/proc/self/fd/{n}")), flush(n))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"-> {b}"), replace(a, b))[1])
    checkpoint.save({"model": {}}, tmp_path, [checkpoint.LAST])
    assert events == [str(tmp_path / "checkpoint.tmp"), f"-> {tmp_path / checkpoint.LAST}", str(tmp_path)]


@pytest.mark.parametrize("where", ["update", "write", "rename"])
def test_killed_and_resumed_equals_uninterrupted(finished, run_main, monkeypatch, where):
    """Killed without warning: in an update, half way through a file, or just before its renaming."""
    whole = finished / "out" / "tiny" / "default"
    target, name = {
        "update": (torch.optim.AdamW, "step"),
        "write": (checkpoint.torch, "save"),
        "rename": (checkpoint, "rename"),
    }[where]
    original, calls = getattr(target, name), []

    def dies(*arguments, **k):
        calls.append(0)
        if len(calls) == (14 if where == "update" else 5):  # in the second epoch
            if where == "write":
                arguments[1].write(b"half a file")
                arguments[1].flush()
            raise KeyboardInterrupt  # nothing catches it, as nothing catches SIGKILL
        return original(*arguments, **k)

    monkeypatch.setattr(target, name, dies)
    with pytest.raises(KeyboardInterrupt):
        run_main(TRAIN__EPOCHS=3, SAVE_FREQ=2)
    monkeypatch.undo()
    assert_same_run(run_main(TRAIN__EPOCHS=3, SAVE_FREQ=2), whole)


def one_bit_flipped(content):
    return content[:-50_000] + bytes([content[-50_000] ^ 1]) + content[-49_999:]


@pytest.mark.parametrize("damage", [lambda content: content[:5000], one_bit_flipped])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished, run_main, tmp_path, damage):
    whole = finished / "out" / "tiny" / "default"
    last = shutil.copytree(whole, tmp_path / "out" / "tiny" / "default") / "last_ckpt.pth"
    last.write_bytes(damage(last.read_bytes()))
    folder = run_main(TRAIN__EPOCHS=3, SAVE_FREQ=2)
    log = (folder / "log_rank0.txt").read_text()
    assert "last_ckpt.pth is not a whole checkpoint" in log and "falling back to the one before" in log
    assert f"resumed from {folder / 'last_ckpt.previous.pth'}: epoch 3, update 10" in log
    a, b = (checkpoint.read(f / "last_ckpt.pth") for f in (folder, whole))
    assert a["epoch"] == b["epoch"] == 3 and same(a["model"], b["model"]) and same(a["model_ema"], b["model_ema"])
    assert epochs(folder) == epochs(whole)


def test_epochs_and_rate_may_change_on_resume(run_main):
    folder = run_main(TRAIN__EPOCHS=2)
    run_main(TRAIN__EPOCHS=4, TRAIN__BASE_LR=2e-3, TRAIN__WEIGHT_DECAY=0.1)
    log = (folder / "log_rank0.txt").read_text()
    for line in ("TRAIN.EPOCHS 2 -> 4", "TRAIN.BASE_LR 0.001 -> 0.002", "TRAIN.WEIGHT_DECAY 0.05 -> 0.1"):
        assert f"changed since the checkpoint: {line}" in log
    lines = epochs(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    # Epoch 3 of 4 with one of warm-up: its last rate is on the cosine of the new peak.
    updates = checkpoint.read(folder / "last_ckpt.pth")["lr_scheduler"]["update"] // 4
    done = (2 * updates - 1) / (3 * updates)
    assert lines[2]["lr"] == pytest.approx(5e-6 + (2e-3 - 5e-6) * 0.5 * (1 + np.cos(np.pi * done)), rel=1e-6)
    groups = checkpoint.read(folder / "last_ckpt.pth")["optimizer"]["param_groups"]
    assert {g["weight_decay"] for g in groups} == {0.0, 0.1}
    run_main(TRAIN__EPOCHS=4)
    assert "already finished: 4 of 4 epochs" in (folder / "log_rank0.txt").read_text()


def test_number_of_workers_changes_nothing(trained_once, run_main):
    """Augmentation depends on seed, epoch and image alone."""
    assert_same_run(run_main(TRAIN__EPOCHS=1, DATA__NUM_WORKERS=2), trained_once)


# ------------------------------------------------------------------------------------------ math
def test_the_peak_rate_is_the_one_named_and_scales_linearly(trained_once, run_main, monkeypatch, capsys):
    log = (trained_once / "log_rank0.txt").read_text()
    assert "peak learning rate 1.000e-03 = TRAIN.BASE_LR 0.001 x batch 16" in log
    signalled(monkeypatch, torch.optim.AdamW, "step", 1)
    run_main(TRAIN__ACCUMULATION_STEPS=2, out="two")
    assert "peak learning rate 2.000e-03" in capsys.readouterr().out
    signalled(monkeypatch, torch.optim.AdamW, "step", 1)
    run_main(TRAIN__LR_REFERENCE_BATCH=512, out="published")
    assert "peak learning rate 3.125e-05" in capsys.readouterr().out


def test_accumulation_equals_the_large_batch(run_main, monkeypatch):
    """Two passes of 8 give the update of one pass of 16, unknown labels included. BatchNorm in eval mode: it sees
    batches."""
    plain = torch.nn.BatchNorm2d.train
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: plain(self, False))
    opts = dict(TRAIN__EPOCHS=1, MODEL__DROP_PATH_RATE=0.0, DATA__UNCERTAIN="ignore", DATA__MISSING="ignore")
    one = epochs(run_main(**opts))
    two = epochs(run_main("--batch-size", 8, "--accumulation-steps", 2, out="two", **opts))
    for key in ("train_loss", "grad_norm", "val_loss"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-4), key


def test_clipping(trained_once, run_main):
    """The norm reported is the one before clipping; 0 means none, not a gradient of zero."""
    free = epochs(run_main(TRAIN__EPOCHS=1, TRAIN__CLIP_GRAD=0))
    clipped = epochs(trained_once)  # at 5
    assert json.loads((trained_once / "config.json").read_text())["TRAIN"]["CLIP_GRAD"] == 5
    assert free == clipped  # norms stay below 5 here: clipping must change nothing
    assert 0 < free[0]["grad_norm"] < 5
    sgd = dict(TRAIN__EPOCHS=1, TRAIN__OPTIMIZER__NAME="sgd")
    tight = epochs(run_main(TRAIN__CLIP_GRAD=1e-6, out="c", **sgd))
    loose = epochs(run_main(TRAIN__CLIP_GRAD=0, out="d", **sgd))
    assert tight[0]["grad_norm"] > 0.1 and tight[0]["val_loss"] > loose[0]["val_loss"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_stays_near_float32(finished, run_main, dtype):
    exact = epochs(finished / "out" / "tiny" / "default")[0]
    mixed = epochs(run_main("--amp-opt-level", "O1", AMP_DTYPE=dtype, TRAIN__EPOCHS=1))[0]
    assert mixed["train_loss"] != exact["train_loss"]
    assert mixed["train_loss"] == pytest.approx(exact["train_loss"], rel=0.03)


def test_recomputation_changes_nothing(run_main):
    options = dict(TRAIN__EPOCHS=1, MODEL__DROP_PATH_RATE=0.0, DATA__LIMIT=64)
    assert epochs(run_main("--use-checkpoint", out="c", **options)) == epochs(run_main(**options))


def test_mixing_and_layer_decay_train(run_main):
    folder = run_main(
        AUG__MIXUP=0.5, AUG__CUTMIX=1.0, TRAIN__LR_LAYER_DECAY=True, TRAIN__OPTIMIZER__DCN_LR_MUL=0.1, TRAIN__EPOCHS=1
    )
    groups = checkpoint.read(folder / "last_ckpt.pth")["optimizer"]["param_groups"]
    scale = {name: g["lr_scale"] for g in groups for name in g["names"]}
    decay = {name: g["weight_decay"] for g in groups for name in g["names"]}
    assert scale["head.weight"] == 1 and scale["levels.2.blocks.0.mlp.fc1.weight"] == 0.875
    assert scale["levels.2.blocks.0.dcn.offset.weight"] == pytest.approx(0.0875)
    assert scale["patch_embed.conv1.weight"] == 0.875**3
    assert decay["head.weight"] == 0.05
    assert {decay[n] for n in decay if n.endswith("bias") or ".norm" in n} == {0.0}


def test_uncertain_labels_can_be_masked(trained_once, run_main):
    zeros = epochs(trained_once)
    masked = epochs(run_main(TRAIN__EPOCHS=1, DATA__UNCERTAIN="ignore"))
    assert masked[0]["train_loss"] != zeros[0]["train_loss"] and np.isfinite(masked[0]["val_loss"])


# ----------------------------------------------------------------------------------------- ranks
def test_two_ranks_give_the_metrics_of_one(finished, tree, tmp_path):
    """Evaluation of an odd number of images by two gloo ranks."""
    best = finished / "out" / "tiny" / "default" / "best_ckpt.pth"
    split = pd.read_csv(next(tree.glob("*-split.csv.gz")))
    count = (split.split == "test").sum()
    root = tmp_path / "tree"
    root.mkdir()
    (root / "files").symlink_to(tree / "files")
    for path in tree.glob("*.csv.gz"):
        (root / path.name).write_bytes(path.read_bytes())
    if count % 2 == 0:
        edit_csv(root, "split", lambda f: f.drop(f[f.split == "test"].index[0]))
        count -= 1
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["main.py", "--cfg", str(finished / "tiny.yaml"), "--data-path", str(root), "--output", str(tmp_path)]
    evaluate = ["--eval", "--resume", str(best), "--opts", "RESULTS"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env.pop("PYTEST_CURRENT_TEST", None)
    subprocess.run([*launch, *command, *evaluate, str(tmp_path / "two")], cwd=ROOT, env=env, check=True)
    assert main.main([*command[1:], *evaluate, str(tmp_path / "one")]) == 0
    one, two = (json.loads(next((tmp_path / n).glob("*/metrics.json")).read_text()) for n in ("one", "two"))
    assert one["images"] == two["images"] == count
    assert one["auc"] == two["auc"] and one["mean_auc"] == two["mean_auc"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    a, b = (pd.read_csv(next((tmp_path / n).glob("*/predictions.csv"))) for n in ("one", "two"))
    assert list(a.dicom_id) == list(b.dicom_id) and list(a) == list(b)
    numbers = [c for c in a if c.endswith(("_target", "_probability"))]
    assert np.abs(a[numbers] - b[numbers]).max().max() < 1e-6


def test_a_half_set_environment_is_named(run_main, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="RANK is set but LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
        run_main()


# ---------------------------------------------------------------------------------------- errors
def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(one_epoch, run_main):
    before = (one_epoch / "last_ckpt.pth").read_bytes()
    with pytest.raises(UserError, match=r"is not finite \(epoch 2, update \d+ to \d+\); earlier checkpoints"):
        run_main(TRAIN__EPOCHS=3, TRAIN__BASE_LR=1e30, TRAIN__WARMUP_LR=1e30, TRAIN__WARMUP_EPOCHS=0)
    assert (one_epoch / "last_ckpt.pth").read_bytes() == before


def test_a_label_of_one_class_has_no_auc(own_tree, run_main):
    edit_csv(own_tree, "chexpert", lambda f: f.assign(Fracture=None))
    folder = run_main(data=own_tree, TRAIN__EPOCHS=1)
    line = epochs(folder)[0]
    assert line["auc"]["Fracture"] is None
    defined = [v for v in line["auc"].values() if v is not None]
    assert line["mean_auc"] == pytest.approx(np.mean(defined))
    run_main("--eval", data=own_tree)
    metrics = json.loads(next((folder.parents[1] / "results").glob("*/metrics.json")).read_text())
    assert metrics["auc"]["Fracture"] is None and metrics["positives"]["Fracture"] == 0
    log = (folder / "log_rank0.txt").read_text()
    assert "Fracture -" in log and "left out of the mean: " in log


def test_a_broken_image_stops_training_with_its_name(own_tree, run_main):
    split = pd.read_csv(next(own_tree.glob("*-split.csv.gz")))
    row = split[split.split == "train"].iloc[3]
    path = next(own_tree.rglob(f"{row.dicom_id}.jpg"))
    path.write_bytes(path.read_bytes()[:300])
    for workers in (0, 1):
        with pytest.raises(UserError, match=f"^{path}: cannot be read as an image"):
            run_main(data=own_tree, DATA__NUM_WORKERS=workers, out=f"w{workers}")


def test_checkpoints_that_do_not_fit(finished, run_main, tree, tmp_path):
    best = finished / "out" / "tiny" / "default" / "best_ckpt.pth"
    wide = dict(MODEL__INTERN_IMAGE__CHANNELS=32)
    with pytest.raises(UserError, match=r"another model: patch_embed.conv1.weight is \(8, 3, 3, 3\), here"):
        run_main("--eval", "--resume", best, **wide)
    with pytest.raises(UserError, match="best_ckpt.pth is a checkpoint of another model"):
        run_main("--resume", best, **wide)
    with pytest.raises(UserError, match="best_ckpt.pth was trained on the labels Atelectasis.*the data has Edema"):
        run_main("--eval", "--resume", best, DATA__LABELS="['Edema']", MODEL__NUM_CLASSES=1)
    with pytest.raises(UserError, match="best_ckpt.pth does not exist"):
        run_main("--eval", out="nothing here")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="foreign.pth is not a checkpoint of this project"):
        run_main("--eval", "--resume", tmp_path / "foreign.pth")


def test_mistakes_are_found_before_training(run_main, tmp_path, tree):
    with pytest.raises(UserError, match="MODEL.NUM_CLASSES is 5, but the data has 14 labels"):
        run_main(MODEL__NUM_CLASSES=5)
    with pytest.raises(
        UserError, match=r"DATA.DATASET is 'chexprt'; choose one of .*mimic_cxr, .*did you mean chexpert"
    ):
        run_main("--dataset", "chexprt")
    with pytest.raises(UserError, match="MODEL.TYPE is 'resnet'; choose one of intern_image"):
        run_main(MODEL__TYPE="resnet")
    with pytest.raises(UserError, match="TRAIN.LOSS is 'hinge'; choose one of bce, focal, asymmetric"):
        run_main(TRAIN__LOSS="hinge")
    with pytest.raises(UserError, match="fewer than one update takes .batch 4000 x 1"):
        run_main("--batch-size", 4000)
    with pytest.raises(UserError, match="DATA.DATA_PATH is empty; give the data folder with --data-path"):
        run_main(data="")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output folder .* cannot be written .* choose another --output"):
        run_main(out="file/below")


def test_the_command_line_prints_one_line_and_no_traceback(tiny, tmp_path):
    """The smoke test of the entry point as a process of its own."""
    command = [sys.executable, "main.py", "--cfg", str(tiny), "--data-path", str(tmp_path / "nowhere")]
    done = subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: data path {tmp_path / 'nowhere'} is not a folder; give the release folder with --data-path"
    )


def test_throughput(run_main, capsys):
    run_main("--throughput", "--batch-size", 4)
    said = capsys.readouterr().out
    assert re.search(
        r"training step: [\d.]+ images/s \(batch 4, torch.float32, cpu\), ms: forward [\d.]+, backward [\d.]+, "
        r"optimizer [\d.]+; peak memory [\d.]+ GB\s+[\d.]+ GMACs an image: \d+% of the rate of matrix products",
        said,
    )
    assert re.search(r"fed by the loader: [\d.]+ images/s, \d+% of that; \d+% waiting for data", said)
    run_main("--throughput", data="")
    assert "fed by the loader" not in capsys.readouterr().out


def test_without_any_auc_there_is_no_best_and_it_is_said(drawn, own_tree, run_main):
    """Every label has one class only: null everywhere, no best checkpoint, and the way out."""
    edit_csv(own_tree, "chexpert", lambda f: f.assign(**dict.fromkeys(LABELS)))
    folder = run_main(data=own_tree, TRAIN__EPOCHS=1)
    assert epochs(folder)[0]["mean_auc"] is None and not (folder / "best_ckpt.pth").exists()
    assert f"--eval --resume {folder / 'last_ckpt.pth'}" in (folder / "log_rank0.txt").read_text()
    run_main("--eval", "--resume", folder / "last_ckpt.pth", data=own_tree)
    metrics = json.loads(next((folder.parents[1] / "results").glob("*/metrics.json")).read_text())
    assert metrics["mean_auc"] is None


def test_nothing_is_begun_anew_over_checkpoints_that_cannot_be_read(one_epoch, run_main):
    for path in one_epoch.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="none of the checkpoints in .* can be read; move them away"):
        run_main(TRAIN__EPOCHS=2)


def test_eval_takes_the_runs_best_and_says_what_changed(finished, one_epoch, run_main, tmp_path):
    """Also when the command still carries --pretrained, and never a head that was not in the file."""
    best = finished / "out" / "tiny" / "default" / "best_ckpt.pth"
    run_main("--eval", "--pretrained", best, DATA__IMG_SIZE=48)
    results = json.loads(next((one_epoch.parents[1] / "results").glob("*/metrics.json")).read_text())
    assert results["checkpoint"] == str(one_epoch / "best_ckpt.pth")
    assert "changed since the checkpoint: DATA.IMG_SIZE 32 -> 48" in (one_epoch / "log_rank0.txt").read_text()
    weights = {k: v for k, v in checkpoint.read(best)["model"].items() if not k.startswith("head.")}
    torch.save(weights, tmp_path / "headless.pth")
    with pytest.raises(UserError, match="headless.pth has no head for these 14 classes"):
        run_main("--eval", "--pretrained", tmp_path / "headless.pth", out="other")


def test_averaged_weights_are_not_resumed(finished, run_main):
    with pytest.raises(UserError, match="ema_best_ckpt.pth holds averaged weights"):
        run_main("--resume", finished / "out" / "tiny" / "default" / "ema_best_ckpt.pth")


def test_a_gradient_that_is_not_finite_stops_too(one_epoch, run_main, monkeypatch):
    before = (one_epoch / "last_ckpt.pth").read_bytes()
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="the loss or its gradient is not finite"):
        run_main(TRAIN__EPOCHS=2)
    assert (one_epoch / "last_ckpt.pth").read_bytes() == before
    assert "error: the loss or its gradient" in (one_epoch / "log_rank0.txt").read_text()


def test_a_cut_line_of_metrics_does_not_stop_a_run(one_epoch, run_main):
    with open(one_epoch / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "train_lo')
    run_main(TRAIN__EPOCHS=2)
    assert [line["epoch"] for line in epochs(one_epoch)] == [1, 2]


def test_frozen_offsets(run_main):
    """A rate factor of 0 keeps its parameters where they began."""
    folder = run_main(TRAIN__EPOCHS=1, TRAIN__OPTIMIZER__DCN_LR_MUL=0.0)
    model = checkpoint.read(folder / "last_ckpt.pth")["model"]
    assert (model["levels.0.blocks.0.dcn.offset.weight"] == 0).all()
    assert epochs(folder)[0]["lr"] > 0


def test_policies_and_losses_come_from_the_config(run_main):
    """A mapping by label from the command line, another loss, weights of positives: it trains and says so."""
    folder = run_main(
        "--opts", "DATA.UNCERTAIN", "{default: zeros, Consolidation: ignore}", "TRAIN.POS_WEIGHT_CAP", "5",
        TRAIN__LOSS="asymmetric", TRAIN__EPOCHS=1, TRAIN__WARMUP_EPOCHS=0,
    )  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["DATA"]["UNCERTAIN"]["Consolidation"] == "ignore"
    assert len(epochs(folder)) == 1
    run_main("--eval", out="out", TRAIN__LOSS="focal", DATA__UNCERTAIN="{Edema: ones}")


# ------------------------------------------------------------------------------------ bad images
def test_bad_images_are_skipped_and_counted_when_asked(run_main, own_tree, tmp_path):
    """One bad image a split: an error by default; skipped, the others' predictions stay what they were."""
    from dataset.files.images import ImageError
    from dataset.mimic_cxr import MIMICCXRDataset

    whole = run_main(data=own_tree, TRAIN__EPOCHS=1)
    run_main("--eval", data=own_tree)
    first = {s: MIMICCXRDataset(own_tree, s) for s in ("train", "validate", "test")}
    bad = {s: own_tree / d.table.path[1].decode() for s, d in first.items()}
    for path in bad.values():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ImageError, match=bad["train"].name):
        run_main(data=own_tree, out="error", TRAIN__EPOCHS=1)
    skip = {"DATA__ON_BAD_IMAGE": "skip", "TRAIN__EPOCHS": 1, "DATA__BATCH_SIZE": 4}  # every train image is seen
    folder = run_main(data=own_tree, out="skip", **skip)
    assert epochs(folder)[0]["skipped"] == 1
    log = (folder / "log_rank0.txt").read_text()
    assert log.count(f"skipped (DATA.ON_BAD_IMAGE): {bad['train']}") == 1
    assert f"skipped (DATA.ON_BAD_IMAGE): {bad['validate']}" in log
    with pytest.raises(ImageError):
        run_main("--eval", "--resume", whole / "best_ckpt.pth", data=own_tree)
    run_main("--eval", "--resume", whole / "best_ckpt.pth", data=own_tree, **skip)
    before, after = sorted((tmp_path / "out" / "results").glob("evaluation_*"))  # the one that failed left none
    metrics = json.loads((after / "metrics.json").read_text())
    assert metrics["skipped"] == 1 and metrics["images"] == len(first["test"]) - 1
    expected = pd.read_csv(before / "predictions.csv").drop(index=1).reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_csv(after / "predictions.csv"), expected, atol=1e-6)
    every = own_tree / "files"
    for path in every.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the images to evaluate can be read"):
        run_main(data=own_tree, out="all", **skip)


def test_a_model_trained_on_jpgs_scores_their_dicoms_alike(run_main, tmp_path):
    """JPGs made from DICOMs as the release was: under mimic_jpg the same AUROC, under window other outputs."""
    from dataset.synthetic.tree import write_tree

    dicoms, jpgs = tmp_path / "dicoms", tmp_path / "jpgs"
    write_tree(dicoms, patients=40, size=64, image_format="dicom", progress=False)
    shutil.copytree(dicoms, jpgs, ignore=shutil.ignore_patterns("*.dcm"))
    for path in dicoms.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        values = ds.pixel_array.astype(np.float64)
        grey = ((values - values.min()) / np.ptp(values) * 255).astype(np.uint8)
        grey = 255 - grey if ds.PhotometricInterpretation == "MONOCHROME1" else grey
        rank = np.searchsorted(np.sort(grey.ravel()), np.arange(256), side="right")  # pixels of at most each level
        equal = np.round((rank - rank[grey.min()]) / (grey.size - rank[grey.min()]) * 255).clip(0).astype(np.uint8)
        Image.fromarray(equal[grey]).save((jpgs / path.relative_to(dicoms)).with_suffix(".jpg"), quality=95)
    folder = run_main(data=jpgs, TRAIN__EPOCHS=4)
    checkpoint_path = folder / "last_ckpt.pth"
    scores, tables = [], []
    for data, recipe in ((jpgs, "window"), (dicoms, "mimic_jpg"), (dicoms, "window")):
        out = f"{data.name}-{recipe}"
        run_main("--eval", "--resume", checkpoint_path, data=data, out=out, DATA__DICOM_RECIPE=recipe)
        (result,) = (tmp_path / out / "results").iterdir()
        scores.append(json.loads((result / "metrics.json").read_text())["mean_auc"])
        tables.append(pd.read_csv(result / "predictions.csv").filter(like="_probability").to_numpy())
    assert abs(scores[1] - scores[0]) < 0.005, scores
    assert np.abs(tables[1] - tables[0]).mean() < 0.3 * np.abs(tables[2] - tables[0]).mean()


# ----------------------------------------------------------------------- what would be lost in silence
def test_a_finished_run_is_not_begun_anew(finished, run_main, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    before = (tmp_path / "out" / "tiny" / "default" / "best_ckpt.pth").read_bytes()
    with pytest.raises(UserError, match="TRAIN.AUTO_RESUME is False, but .* holds a run"):
        run_main(TRAIN__AUTO_RESUME=False)
    assert (tmp_path / "out" / "tiny" / "default" / "best_ckpt.pth").read_bytes() == before


def test_an_unknown_tag_is_answered_with_those_there_are(finished, run_main, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    with pytest.raises(UserError, match="nope/best_ckpt.pth does not exist; --tag can be default$"):
        run_main("--eval", "--tag", "nope")
    assert [p.name for p in (tmp_path / "out" / "tiny").iterdir()] == ["default"]


def test_the_average_inside_a_checkpoint_is_evaluated(finished, run_main, tmp_path):
    """--ema --resume FILE: the scores of its EMA, which the last epoch validated too; without an average an error."""
    last = finished / "out" / "tiny" / "default" / "last_ckpt.pth"
    state = checkpoint.read(last)
    averaged = state | {"model": state["model_ema"]}
    torch.save(averaged, tmp_path / "averaged.pth")
    predictions = []
    for k, flags in enumerate(
        (["--ema", "--resume", last], ["--resume", tmp_path / "averaged.pth"], ["--resume", last])
    ):
        run_main("--eval", *flags, out=str(k))
        (path,) = (tmp_path / str(k) / "results").glob("evaluation_*/predictions.csv")
        predictions.append(path.read_text())
    assert predictions[0] == predictions[1] != predictions[2]
    held_out = pd.read_csv(next((tmp_path / "0" / "results").glob("evaluation_*/predictions_validate.csv")))
    logged = epochs(last.parent)[-1]["ema"]["auc"]
    for name, value in logged.items():
        if value is not None:
            assert value == pytest.approx(roc_auc_score(held_out[f"{name}_target"], held_out[f"{name}_probability"]))
    torch.save(state | {"model_ema": None}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="none.pth has no EMA weights"):
        run_main("--eval", "--ema", "--resume", tmp_path / "none.pth")
    with pytest.raises(UserError, match="--ema: .*ema_best_ckpt.pth does not exist, and .* has none that"):
        run_main("--eval", "--ema", "--pretrained", last)


def test_scores_of_two_validation_sets_are_not_compared(finished, run_main, tmp_path):
    """After another label policy the best begins anew, and that is said."""
    shutil.copytree(finished / "out", tmp_path / "out")
    run = run_main(TRAIN__EPOCHS=4, DATA__UNCERTAIN="ones")
    log = (run / "log_rank0.txt").read_text()
    assert "was validated on other images or labels than now" in log
    assert "WARNING changed since the checkpoint: DATA.UNCERTAIN 'zeros' -> 'ones'" in log
    assert "INFO changed since the checkpoint: TRAIN.EPOCHS 3 -> 4" in log
    last = epochs(run)[-1]
    assert last["epoch"] == 4 and last["best_mean_auc"] == last["mean_auc"]


def test_other_training_images_begin_the_epoch_anew(run_main, own_tree, monkeypatch):
    """Stopped after 4 of 9 updates of an epoch; half of the training rows are gone then: 4 updates from the first."""
    steps = signalled(monkeypatch, torch.optim.AdamW, "step", 4, signal.SIGUSR1)
    run_main(data=own_tree, TRAIN__EPOCHS=1)
    edit_csv(own_tree, "split", lambda f: f[(f.split != "train") | (f.groupby("split").cumcount() % 2 == 0)])
    run = run_main(data=own_tree, TRAIN__EPOCHS=1)
    log = (run / "log_rank0.txt").read_text()
    assert "was saved within epoch 1 with other training images or another order of them" in log
    assert len(steps) == 4 + 4 and "update 4/4" in log


# -------------------------------------------------------------------------------- faults of the machine
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "error, message",
    [
        (OUT_OF_MEMORY, "not hold a batch of 16 images of 32 .*--batch-size .*--accumulation-steps.*--use-checkpoint"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
         "does not hold a batch of 16"),
        (MemoryError(), "does not hold a batch of 16"),
        (RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "), "was killed.*NUM_WORKERS .*--mem"),
        (RuntimeError("DataLoader worker (pid(s) 5, 6) exited unexpectedly"), "was killed.*DATA.NUM_WORKERS"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                      "workers are out of shared memory."), "no room in shared memory"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), "no room in shared memory"),
        (RuntimeError("unable to write to file </torch_9_7_0>: No space left on device (28)"),
         "no room in shared memory"),
        (RuntimeError("unable to mmap 96 bytes from file </torch_9_7_0>: Cannot allocate memory (12)"),
         "no room in shared memory"),
        (OSError(28, "No space left on device", "log.txt"), "no space is left .No space left on device: 'log.txt'"),
        (ValueError("Expected more than 1 value per channel when training, got input size torch.Size([1, 192, 1, 1])"),
         "batch normalisation cannot train on one value"),
        (RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),  # Triton's
         "TRAIN.COMPILE True: torch cannot compile intern_image .out of resource: shared memory.* set TRAIN.COMPILE"),
    ],
)  # fmt: skip
def test_faults_of_the_machine_are_one_line(tiny, error, message):
    config = config_module.get_config(config_module.parse_args(["--cfg", str(tiny)]))
    explanation = faults.explain(error, config, distributed.World(0, 1, torch.device("cpu")))
    assert re.search(message, explanation) and "\n" not in explanation


def test_a_fault_leaves_its_traceback_in_the_log_file_only(run_main, monkeypatch, tmp_path):
    def fails(*_):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(Step, "__call__", fails)
    with pytest.raises(UserError, match="does not hold a batch of 16") as raised:
        run_main()
    log = (tmp_path / "out" / "tiny" / "default" / "log_rank0.txt").read_text()
    assert "Traceback" in log and f"error: {raised.value}" in log


def test_an_unknown_exception_keeps_its_traceback(run_main, monkeypatch, tmp_path):
    monkeypatch.setattr(Step, "__call__", lambda *_: {}["no such thing"])
    with pytest.raises(KeyError):
        run_main()
    log = (tmp_path / "out" / "tiny" / "default" / "log_rank0.txt").read_text()
    assert "Traceback" in log and "no such thing" in log


def test_a_batch_of_one_at_the_smallest_size(run_main):
    """The real exception: at 32 px and batch 1 one value a channel reaches the batch normalisation."""
    with pytest.raises(UserError, match="batch normalisation cannot train on one value: a batch of 1 images"):
        run_main(DATA__BATCH_SIZE=1)


def test_a_loading_process_that_is_killed(run_main, monkeypatch):
    """The real exception: a worker that kills itself, as the kernel does for want of memory."""
    from dataset import build

    item = build.SeededDataset.__getitem__

    def killed(self, key):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, key)

    monkeypatch.setattr(build.SeededDataset, "__getitem__", killed)
    monkeypatch.setattr(build, "POLL", 0.2)
    with pytest.raises(UserError, match=r"was killed, most likely for want of memory; .*\(now 1\)"):
        run_main(DATA__NUM_WORKERS=1)


def test_another_image_domain_than_in_training_is_said(run_main, own_tree, finished):
    """Trained on the tree's JPGs, tested on DICOMs by the default recipe: a line of the log, and in metrics.json."""
    from dicom_writer import image

    checkpoint_path = finished / "out" / "tiny" / "default" / "best_ckpt.pth"
    assert checkpoint.read(checkpoint_path)["domain"] == "pictures"
    for path in (own_tree / "files").rglob("*.jpg"):
        grey = np.asarray(Image.open(path).convert("L")).astype(int)
        path.with_suffix(".dcm").write_bytes(image(grey, ("WindowCenter", "DS", "100"), ("WindowWidth", "DS", "90")))
        path.unlink()
    for recipe, warned in (("window", True), ("mimic_jpg", False)):
        run = run_main("--eval", "--resume", checkpoint_path, data=own_tree, out=recipe, DATA__DICOM_RECIPE=recipe)
        metrics = json.loads(next(run.parents[1].glob("results/*/metrics.json")).read_text())
        assert metrics["domain"] == {"trained": "pictures", "tested": f"dicom {recipe}"}
        log = (run / "log_rank0.txt").read_text()
        assert warned == any("DATA.DICOM_RECIPE mimic_jpg" in text for text in metrics["warnings"])
        assert warned == ("WARNING the model was trained on pictures, these images are dicom window" in log)


def test_tensorboard_gets_the_lines_of_the_log_and_a_batch(run_main, monkeypatch):
    """With a stand-in for its writer; without the package one line says so."""
    written, batches = {}, []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, epoch):
            written[name, epoch] = value

        def add_images(self, name, images, epoch):
            batches.append(images)

        def flush(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert "analysis.tensorboard" not in sys.modules  # nothing has asked for it
    run = run_main(LOG__TENSORBOARD=True)
    for line in epochs(run):
        for name in ("train_loss", "val_loss", "lr", "mean_auc"):
            assert written[name, line["epoch"]] == line[name]
        assert written["auc/Edema", line["epoch"]] == line["auc"]["Edema"]
    assert len(batches) == 2 and batches[0].shape == (8, 3, 32, 32)
    assert 0 <= batches[0].min() and batches[0].max() <= 1 and batches[0].std() > 0.05
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run_main(LOG__TENSORBOARD=True, out="other")


# --------------------------------------------------------------------------------- a run loses nothing
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_within_validation_keeps_the_epoch(finished, run_main, monkeypatch, number):
    """In the model's validation of epoch 2 (3 batches), or its EMA's; the resumed run validates and ends the same."""
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # these tests themselves may run under nohup
    at = {signal.SIGTERM: 7, signal.SIGHUP: 10, signal.SIGINT: 12}[number]  # batches are moved once in training too
    calls = signalled(monkeypatch, Loader, "_send", 9 + 6 + 9 + at - 6, number)
    folder = run_main(TRAIN__EPOCHS=3, SAVE_FREQ=2)
    assert run_main.status == number
    state = checkpoint.read(folder / checkpoint.LAST)
    assert (state["epoch"], state["update"], state["lr_scheduler"]["update"]) == (1, 9, 18)
    before = len(calls)
    run_main(TRAIN__EPOCHS=3, SAVE_FREQ=2)
    assert len(calls) == before + 6 + 9 + 6  # validation of epoch 2, and all of epoch 3
    assert_same_run(folder, finished / "out" / "tiny" / "default")


def test_a_trained_epoch_is_only_validated_whatever_the_batch_is_now(run_main, monkeypatch):
    """As after a validation that the GPU's memory did not hold, or on another number of GPUs."""
    signalled(monkeypatch, Loader, "_send", 9 + 2)
    folder = run_main(TRAIN__EPOCHS=1)
    state = checkpoint.read(folder / checkpoint.LAST)
    steps = signalled(monkeypatch, torch.optim.AdamW, "step", 0)
    torch.save(
        state | {"sums": [state["sums"][0] | {"loss": state["sums"][0]["loss"] * k} for k in (0.5, 1.5)]},
        folder / checkpoint.LAST,
    )  # of two ranks
    run_main(TRAIN__EPOCHS=1, DATA__BATCH_SIZE=8)
    (epoch,) = epochs(folder)
    assert not steps and epoch["train_loss"] == pytest.approx(state["sums"][0]["loss"].item() / 9)


def test_an_unreadable_validation_image_costs_nothing_but_validation(finished, own_tree, run_main, monkeypatch):
    split = pd.read_csv(next(own_tree.glob("*-split.csv.gz")))
    path = next(own_tree.rglob(f"{split[split.split == 'validate'].iloc[-1].dicom_id}.jpg"))
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    for _ in range(2):
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            run_main(data=own_tree, TRAIN__EPOCHS=3, SAVE_FREQ=2)
    path.write_bytes(whole)
    calls = signalled(monkeypatch, torch.optim.AdamW, "step", 0)
    folder = run_main(data=own_tree, TRAIN__EPOCHS=3, SAVE_FREQ=2)
    assert len(calls) == 18  # epoch 1 was trained once
    assert_same_run(folder, finished / "out" / "tiny" / "default")


def test_a_stop_before_the_first_update_is_one_line(run_main, monkeypatch, tmp_path):
    signalled(monkeypatch, run_module, "build_model", 1)
    folder = run_main(TRAIN__EPOCHS=1)
    assert run_main.status == signal.SIGTERM and not list(folder.glob("*.pth"))
    assert "stopped by SIGTERM; the same command continues from here" in (folder / "log_rank0.txt").read_text()


def test_a_stop_while_the_step_compiles_is_heeded_at_once(run_main, monkeypatch):
    def compiling(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    monkeypatch.setattr(Step, "__call__", compiling)
    monkeypatch.setattr(compiling_module, "compile_model", lambda model, *_: model)
    folder = run_main(TRAIN__COMPILE=True)
    assert run_main.status == signal.SIGTERM
    assert "compiling the model: the first update takes minutes" in (folder / "log_rank0.txt").read_text()


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.StopRequest(distributed.World(0, 1, torch.device("cpu"))) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agreed() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_system_without_locks_and_flushes(run_main, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    flush = os.fsync

    def no_folders(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(number)

    monkeypatch.setattr(distributed.fcntl, "flock", refuses)
    monkeypatch.setattr(os, "fsync", no_folders)
    files.warn_once.cache_clear()
    folder = run_main(TRAIN__EPOCHS=1)
    log = (folder / "log_rank0.txt").read_text()
    assert log.count("this file system has no locks") == log.count("cannot flush a folder") == 1
    assert (folder / "best_ckpt.pth").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_full_disk_is_one_line(run_main, monkeypatch, tmp_path, name):
    write = Path.write_text

    def full(path, text, **k):
        if path.name.startswith(name):
            write(path, text[:10], **k)
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))
        return write(path, text, **k)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=f"{name} could not be written .Disk quota exceeded.; make room"):
        run_main(TRAIN__EPOCHS=1)
    assert not [p.name for p in (tmp_path / "out" / "tiny" / "default").iterdir() if name in p.name]


def test_too_little_space_is_named_at_start(run_main, monkeypatch):
    usage = types.SimpleNamespace(free=20_000_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    folder = run_main(TRAIN__EPOCHS=1, TRAIN__STOP_AFTER=1)
    assert re.search(
        r"WARNING .* has 20 MB free, and 6 checkpoints take \d+ MB", (folder / "log_rank0.txt").read_text()
    )
    usage.free = 1_000_000
    with pytest.raises(
        UserError, match="has 1 MB free, a checkpoint takes [1-9]\\d* MB and is written beside the one before"
    ):
        run_main(out="b")


def test_another_run_resumed_under_a_new_tag_has_a_best_of_its_own(finished, run_main):
    last = finished / "out" / "tiny" / "default" / "last_ckpt.pth"
    folder = run_main("--resume", last, TRAIN__EPOCHS=4, TRAIN__STOP_AFTER=2)  # counted from here on
    log = (folder / "log_rank0.txt").read_text()
    assert f"{folder / 'best_ckpt.pth'} does not exist, so best_ckpt.pth restarts" in log
    assert checkpoint.read(folder / "best_ckpt.pth")["epoch"] == 4


def test_another_seed_or_optimizer_within_an_epoch_is_said(run_main, monkeypatch):
    calls = signalled(monkeypatch, torch.optim.AdamW, "step", 4)
    folder = run_main(TRAIN__EPOCHS=1)
    run_main(TRAIN__EPOCHS=1, SEED=8)
    assert "with other training images or another order of them (SEED" in (folder / "log_rank0.txt").read_text()
    assert len(calls) == 4 + 9
    for name in ("sgd", "adamw"):
        run_main(TRAIN__EPOCHS=2 if name == "sgd" else 3, SEED=8, TRAIN__OPTIMIZER__NAME=name)
        log = (folder / "log_rank0.txt").read_text()
        assert log.count("another TRAIN.OPTIMIZER.NAME: its moments restart at zero") == (1 if name == "sgd" else 2)


def test_the_newest_checkpoints_are_kept_and_early_stopping_resumes(run_main, monkeypatch):
    """Scores that fall from epoch 2 on: stopped after epoch 4, whether or not the run was interrupted."""
    scores = iter([0.5, 0.6, 0.4, 0.3, 0.2, 0.2])
    validate = multilabel.validate_multilabel

    def scored(*a, **k):
        found = validate(*a, **k)
        value = next(scores)
        return dataclasses.replace(found, score=value, record={**found.record, "mean_auc": value})

    monkeypatch.setitem(TASKS, "multilabel", dataclasses.replace(TASKS["multilabel"], validate=scored))
    options = dict(TRAIN__STOP_AFTER=2, TRAIN__EMA__ENABLE=False, SAVE_KEEP=2)
    folder = run_main(TRAIN__EPOCHS=3, **options)
    run_main(TRAIN__EPOCHS=9, **options)
    assert [line["epoch"] for line in epochs(folder)] == [1, 2, 3, 4]
    assert {p.name for p in folder.glob("ckpt_epoch_*")} == {"ckpt_epoch_3.pth", "ckpt_epoch_4.pth"}
    run_main(TRAIN__EPOCHS=9, **options)
    log = (folder / "log_rank0.txt").read_text()
    assert len(epochs(folder)) == 4
    assert "already finished: 4 of 9 epochs, none better since epoch 2 (TRAIN.STOP_AFTER 2)" in log


def test_frozen_levels_do_not_change_and_end_the_backward_pass(trained_once, run_main, monkeypatch):
    seen = []
    step = Step.__call__

    def looked_at(self, *a, **k):
        seen.append([m.training for name, m in self.model.named_modules() if name.startswith("levels.0")])
        return step(self, *a, **k)

    monkeypatch.setattr(Step, "__call__", looked_at)
    folder = run_main("--pretrained", trained_once / "last_ckpt.pth", TRAIN__EPOCHS=1,
                      TRAIN__FREEZE="[patch_embed, levels.0]")  # fmt: skip
    assert seen and not any(any(modes) for modes in seen)
    a, b = (checkpoint.read(f / "last_ckpt.pth")["model"] for f in (trained_once, folder))
    for name in a:
        frozen = name.startswith(("patch_embed.", "levels.0."))
        assert torch.equal(a[name], b[name]) == frozen or "num_batches" in name, name
    groups = checkpoint.read(folder / "last_ckpt.pth")["optimizer"]["param_groups"]
    assert not [n for g in groups for n in g["names"] if n.startswith(("patch_embed.", "levels.0."))]
    with pytest.raises(UserError, match="TRAIN.FREEZE: the model has no part 'level.0' .did you mean levels.0"):
        run_main(TRAIN__FREEZE="[level.0]")


def test_an_evaluation_of_other_pixels_than_in_training_is_warned_about(finished, run_main):
    best = finished / "out" / "tiny" / "default" / "best_ckpt.pth"
    folder = run_main("--eval", "--resume", best, DATA__IMG_SIZE=48, DATA__RESIZE="pad")
    metrics = json.loads(next((folder.parents[1] / "results").glob("*/metrics.json")).read_text())
    for key, value in (("DATA.IMG_SIZE", "32"), ("DATA.RESIZE", "squeeze")):
        assert any(f"was trained with {key} {value}" in text for text in metrics["warnings"])
    assert metrics["checkpoint_sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()


def test_a_checkpoint_is_evaluated_as_it_was_trained(finished, run_main, tree, tmp_path):
    """Without --cfg: the same predictions as with the training's own file, whatever the defaults are."""
    best = finished / "out" / "tiny" / "default" / "best_ckpt.pth"
    argv = ["--eval", "--resume", str(best), "--data-path", str(tree), "--output", str(tmp_path / "o")]
    assert main.main([*argv, "--opts", "RESULTS", str(tmp_path / "r")]) == 0
    (folder,) = (tmp_path / "r").iterdir()
    (before,) = (finished / "results").iterdir()
    assert (folder / "predictions.csv").read_bytes() == (before / "predictions.csv").read_bytes()
    assert json.loads((folder / "metrics.json").read_text())["warnings"] == []
    with pytest.raises(UserError, match="arguments are required: --cfg .only --eval --resume CHECKPOINT goes without"):
        main.main(["--data-path", str(tree)])
    torch.save({"model": {}}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="bare.pth is not a checkpoint of this project: it has no config"):
        main.main(["--eval", "--resume", str(tmp_path / "bare.pth"), "--data-path", str(tree)])


def test_an_evaluation_without_room_or_results_leaves_nothing(finished, run_main, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(testing, "test_split", None)
    best = finished / "out" / "tiny" / "default" / "best_ckpt.pth"
    with pytest.raises(UserError, match="has no room for about .* MB .No space left on device."):
        run_main("--eval", "--resume", best)
    monkeypatch.undo()

    def fails(*_):
        assert list((tmp_path / "out" / "results").glob("evaluation_*"))
        raise UserError("unreadable")

    monkeypatch.setattr(testing, "test_split", fails)
    with pytest.raises(UserError, match="unreadable"):
        run_main("--eval", "--resume", best)
    assert not list((tmp_path / "out" / "results").iterdir())  # neither left a folder


def test_ranks_wait_until_the_checkpoint_is_written(tmp_path, monkeypatch):
    """A rank that ended before would have the launcher kill rank 0 in the file."""
    done = []
    monkeypatch.setattr(checkpoint, "save", lambda *_: done.append("written"))
    monkeypatch.setattr(distributed, "gather", lambda value, world: done.append(f"rank {world.rank} waits"))
    for rank in (0, 1):
        world = distributed.World(rank, 2, torch.device("cpu"))
        run = types.SimpleNamespace(
            parts=[state.Weights(torch.nn.Linear(1, 1), None, LOG)], world=world, folder=tmp_path,
            position=types.SimpleNamespace(epoch=0, update=1),
        )  # fmt: skip
        run_module.Run.save(run, ["a.pth"])
    assert done == ["written", "rank 0 waits", "rank 1 waits"]


def test_a_checkpoint_of_unknown_origin_imports_nothing(finished, tmp_path):
    content = checkpoint.read(finished / "out" / "tiny" / "default" / "best_ckpt.pth")
    for k, (section, key, value) in enumerate(
        (("MODEL", "TYPE", "antigravity"), ("DATA", "DATASET", "antigravity"), ("DATA", "DATASET", "tools.antigravity"),
         ("DATA", "SOURCES", [{"dataset": "antigravity", "path": "/"}]))
    ):  # fmt: skip
        config = content["config"] | {section: content["config"][section] | {key: value}}
        torch.save(content | {"config": config}, tmp_path / f"{k}.pth")
        with pytest.raises(UserError, match=f"{k}.pth: {section}.{key} is .*antigravity', no file of "):
            main.main(["--eval", "--resume", str(tmp_path / f"{k}.pth"), "--data-path", str(tmp_path)])
    assert "antigravity" not in sys.modules


def test_gpus_that_torch_does_not_see_are_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for given, lines in ((None, 0), ("3", 1)):
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", given) if given else monkeypatch.delenv("SLURM_GPUS_ON_NODE", False)
        with distributed.session():
            pass
        assert capsys.readouterr().err.count("warning: SLURM_GPUS_ON_NODE is 3 on ") == lines


def test_ctrl_c_leaves_no_traceback():
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(interrupted)
    assert ended.value.code == 130


def test_the_digest_is_that_of_the_bytes_that_were_loaded(finished, tmp_path, monkeypatch):
    """A training that replaces the file in the meantime changes nothing."""
    path = tmp_path / "c.pth"
    shutil.copy(finished / "out" / "tiny" / "default" / "best_ckpt.pth", path)
    wanted, load = hashlib.sha256(path.read_bytes()).hexdigest(), torch.load

    def replaced(*a, **k):
        (tmp_path / "new").write_bytes(b"another")
        os.replace(tmp_path / "new", path)
        return load(*a, **k)

    monkeypatch.setattr(torch, "load", replaced)
    state, sha256 = checkpoint.read_with_digest(path)
    assert sha256 == wanted and state["epoch"]
