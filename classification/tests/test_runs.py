"""report.py --runs: runs that main.py made, finished, stopped and failed; seeds of one configuration together."""

import csv
import json
import shutil
import signal

import numpy as np
import pytest

import report
from analysis.runs import read_runs
from analysis.text import short_names
from common import distributed
from common.errors import UserError


def read(folder):
    return list(csv.DictReader((folder / "runs.csv").open()))


def test_runs_of_main_at_a_glance(drawn, run_main, tmp_path, monkeypatch, capsys):
    first = run_main()
    run_main("--eval")
    (evaluation,) = (tmp_path / "out" / "results").glob("evaluation_*")
    trained = json.loads((evaluation / "metrics.json").read_text())
    assert trained["software"]["torch"] and trained["training"]["config"]["TRAIN"]["EPOCHS"] == 2
    mean = {"value": 0.61, "low": 0.52, "high": 0.7}
    (evaluation / "report.json").write_text(json.dumps({"mean": {"auroc": mean}}))
    other = first.parent / "other_seed"  # the same run, were it of another seed
    shutil.copytree(first, other)
    config = json.loads((other / "config.json").read_text()) | {"SEED": 8, "TAG": "other_seed"}
    (other / "config.json").write_text(json.dumps(config))
    epochs = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    worse = [e | {"mean_auc": e["mean_auc"] - 0.1, "best_mean_auc": e["best_mean_auc"] - 0.1} for e in epochs]
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, worse)))
    with pytest.raises(UserError):
        run_main("--tag", "failed", TRAIN__BASE_LR=1e30)
    with monkeypatch.context() as patch:
        patch.setattr(distributed.StopRequest, "agreed", lambda self: setattr(self, "received", signal.SIGTERM) or 15)
        run_main("--tag", "stopped", TRAIN__BASE_LR=0.002)
    capsys.readouterr()
    report.main(["--runs", str(tmp_path / "out")])
    printed, rows = capsys.readouterr().out, {r["run"].split("/")[-1]: r for r in read(tmp_path / "out")}
    assert set(rows) == {"default", "other_seed", "failed", "stopped"}
    best = max(e["mean_auc"] for e in epochs)
    row = rows["default"]
    assert trained["training"]["epoch"] == int(row["best_epoch"]) and trained["training"]["max_accuracy"] == best
    assert float(row["best"]) == best == epochs[int(row["best_epoch"]) - 1]["mean_auc"] and row["score"] == "mean_auc"
    assert float(row["ema"]) == max(e["ema"]["mean_auc"] for e in epochs)
    assert (row["epochs"], row["epochs_wanted"], row["state"]) == ("2", "2", "finished")
    assert float(row["images_per_s"]) == np.median([e["images_per_s"] for e in epochs])
    assert [float(row[f"test_{k}"]) for k in mean] == list(mean.values()) and row["test_data"] == "mimic_cxr"
    assert not rows["other_seed"]["test_value"]
    assert rows["failed"]["state"].startswith("failed: the loss or its gradient is not finite")
    assert rows["stopped"]["state"].startswith("stopped by SIGTERM")
    assert {"TRAIN.BASE_LR", "SEED"} == {key for key in row if "." in key or key == "SEED"}  # what differs, no more
    line = next(x for x in printed.splitlines() if x.startswith("default, other_seed"))
    assert f"{best - 0.05:.4f}" in line and f"{np.std([best, best - 0.1], ddof=1):.4f}" in line
    page = (tmp_path / "out" / "runs.html").read_text()
    assert "0.610 (0.520–0.700)" in page and "data:image/svg+xml" in page and "2 finished" in page


def test_order_and_what_a_run_leaves_behind(tmp_path):
    for k, (tag, score) in enumerate({"a": 0.7, "b": 0.9, "c": None, "d": 0.5}.items()):
        folder = tmp_path / "net" / tag
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"SEED": k % 2, "TRAIN": {"EPOCHS": 9, "BASE_LR": k // 3}}))
        epoch = {"epoch": 1, "mean_auc": score, "best_mean_auc": score}
        (folder / "metrics.jsonl").write_text(json.dumps(epoch) + '\n{"epoch": 2, "mean')
    (tmp_path / "net" / "d" / "config.json").write_text("{")
    (tmp_path / "net" / "only_evaluated").mkdir()
    (tmp_path / "net" / "only_evaluated" / "log_rank0.txt").write_text("2026-01-01 10:00:00,000 INFO evaluating x\n")
    log = ("epoch 2/9 update 7/8 loss 0.1", "stopped by SIGTERM; the same command continues from here")
    lines = [f"2026-01-01 10:00:00,000 INFO {text}\n" for text in log]
    (tmp_path / "net" / "b" / "log_rank0.txt").write_text("".join(lines))
    runs = read_runs(tmp_path)
    assert [r["folder"].name for r in runs] == ["b", "a", "c", "d"]  # a, b and c are one configuration
    assert [r["done"] for r in runs] == [1, 1, 1, 1] and runs[1]["state"] == "cut off after epoch 1"
    assert runs[0]["state"] == "stopped by SIGTERM in epoch 2, update 7 of 8"
    with pytest.raises(UserError, match="there is no run in or below it"):
        read_runs(tmp_path / "net" / "only_evaluated")
    with pytest.raises(UserError, match="takes no evaluation"):
        report.main(["--runs", str(tmp_path), str(tmp_path)])
    with pytest.raises(UserError, match="--share has no effect with --runs"):
        report.main(["--runs", str(tmp_path), "--share"])
    with pytest.raises(UserError, match="name an evaluation, or --runs"):
        report.main([])


def test_short_names_keep_what_differs():
    assert short_names(["net/run1", "net/run2"]) == ["run1", "run2"]
    assert short_names(["a/x/r", "b/y/r"]) == ["a/x", "b/y"] and short_names(["net/run1"]) == ["net/run1"]
    assert short_names(["net", "net/run1"]) == ["net", "net/run1"] and short_names(["n/a", "n/a"]) == ["n/a", "n/a"]
