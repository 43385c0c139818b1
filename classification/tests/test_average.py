"""average.py: the mean of weights, which of them are taken, what the file records; test-time augmentation in --eval."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import average
import predict
from common.errors import UserError
from conftest import epochs, write_checkpoint
from dataset.labels import LABELS


def read(path):
    return torch.load(path, weights_only=True)


def add(path, **content):
    torch.save(read(path) | content, path)
    return path


@pytest.fixture
def three(tmp_path):
    paths = [write_checkpoint(tmp_path / f"{k}.pth", seed=k, ema_seed=k + 10)[0] for k in range(3)]
    return [
        add(path, patients={"mimic_cxr": torch.tensor([k, 7])}, trained={"mimic_cxr": torch.tensor([k])})
        for k, path in enumerate(paths)
    ]


@pytest.mark.parametrize("flags, key", [((), "model"), (("--ema",), "model_ema")])
def test_the_mean_of_weights_is_a_checkpoint(three, tmp_path, flags, key):
    output = tmp_path / "new" / "soup.pth"
    average.main([*map(str, three), "--output", str(output), *flags])
    found, states = read(output), [read(path) for path in three]
    for name, value in found["model"].items():
        values = np.stack([state[key][name].numpy() for state in states])
        expected = values.mean(0, dtype=np.float64) if value.is_floating_point() else values[0]
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-7)
    assert found["patients"]["mimic_cxr"].tolist() == [0, 1, 2, 7]
    assert found["trained"]["mimic_cxr"].tolist() == [0, 1, 2]
    assert [m["path"] for m in found["averaged"]["members"]] == [str(path) for path in three]
    loaded = predict.trained.load(output)
    assert loaded.label_names == LABELS and loaded.config.TAG == "soup"
    with pytest.raises(UserError, match="soup.pth holds no EMA weights"):
        predict.trained.load(output, ema=True)


def test_what_has_no_mean_is_refused(three, tmp_path):
    one, two, _ = three

    def refused(match, *others, flags=()):
        with pytest.raises(UserError, match=match):
            average.main([str(one), *map(str, others), "--output", str(tmp_path / "soup.pth"), *flags])

    refused("0.pth is one checkpoint; give at least two")
    refused("0.pth is the same checkpoint as one before it", one)
    other = write_checkpoint(tmp_path / "other.pth", labels=["a", "b"])[0]
    refused(r"other.pth was trained on the labels a, b; .*0.pth has Atelectasis, ", other)
    other = write_checkpoint(tmp_path / "size.pth", DATA__IMG_SIZE=64)[0]
    refused("size.pth was trained with DATA.IMG_SIZE 64, .*0.pth with 32", other)
    other = write_checkpoint(tmp_path / "scale.pth", intern_image={"OFFSET_SCALE": 2.0})[0]  # of the same shapes
    refused("scale.pth was trained with MODEL.INTERN_IMAGE.OFFSET_SCALE 2.0, .*0.pth with 1.0", other)
    other = write_checkpoint(tmp_path / "plain.pth", seed=5)[0]
    refused("--ema: .*plain.pth holds no EMA weights", other, flags=("--ema",))
    refused("plain.pth does not exist", tmp_path / "no" / "plain.pth")
    refused("give --greedy too", two, flags=("--data-path", "x"))
    with pytest.raises(UserError, match="--output .*1.pth is one of the checkpoints"):
        average.main([str(one), str(two), "--output", str(two)])
    torch.save({"model": read(one)["model"]}, tmp_path / "bare.pth")
    refused("bare.pth is not a checkpoint of this project", tmp_path / "bare.pth")


def test_greedy_takes_what_loses_nothing():
    """Numbers in place of weights: the score is the distance of their mean to 3."""
    members = [average.Member(str(w), "", {"w": torch.tensor(float(w))}, {}) for w in (2, 9, 5, 4)]
    for sign in (1, -1):
        score = SimpleNamespace(calls=0)

        def of(chosen, sign=sign):
            return -sign * abs(float(average.mean_weights(chosen)["w"]) - 3)

        average.choose_greedily(members, of, sign)
        # 2 and 4 are alike, their mean is 3; with 5 or 9 it is farther.
        assert [member.used for member in members] == [True, False, False, True], score
        assert [abs(member.score) for member in members] == [1, 6, 2, 1]


def test_a_greedy_soup_of_a_run_is_scored_and_tested(run_main, tmp_path, capsys):
    folder = run_main(TRAIN__EPOCHS=3)
    names = [folder / f"ckpt_epoch_{k}.pth" for k in (1, 2, 3)]
    soup = folder / "soup.pth"
    average.main([*map(str, names), "--output", str(soup), "--greedy"])
    record, lines = read(soup)["averaged"], epochs(folder)
    assert [m["score"] for m in record["members"]] == pytest.approx([line["mean_auc"] for line in lines], abs=1e-9)
    assert record["best_by"] == "mean_auc" and record["score"] >= max(line["mean_auc"] for line in lines) - 1e-12
    assert f"{record['score']:.4f} on the validation split" in capsys.readouterr().out
    run_main("--eval", "--resume", soup, TEST__REPORT=True)
    (result,) = (tmp_path / "out" / "results").iterdir()
    report = json.loads((result / "report.json").read_text())
    (said,) = [row["text"] for row in report["methods"] if row["what"] == "epochs"]
    assert said.startswith("the mean of the weights of ") and "default/ckpt_epoch_" in said
    with pytest.raises(UserError, match="soup.pth holds averaged weights"):
        run_main("--resume", soup, out="more")
    # A validation split with patients whom it was trained on measures memory.
    with pytest.raises(UserError, match="ckpt_epoch_1.pth was trained or chosen on .* of this validation split"):
        opts = ["--opts", "DATA.LIMIT", "5"]
        average.main([*map(str, names), "--output", str(soup), "--greedy", *opts])


def test_an_evaluation_augments_as_predict_does(one_epoch, run_main, tree, tmp_path):
    run_main("--eval", "--tta")
    (result,) = (tmp_path / "out" / "results").iterdir()
    table, metrics = pd.read_csv(result / "predictions.csv"), json.loads((result / "metrics.json").read_text())
    images = [str(tree / path) for path in table["path"]]
    predict.main([str(one_epoch / "best_ckpt.pth"), *images, "--tta", "--output", str(tmp_path / "p.csv")])
    found = pd.read_csv(tmp_path / "p.csv")
    columns = [f"{name}_probability" for name in LABELS]
    np.testing.assert_allclose(table[columns], found[list(LABELS)], atol=1e-6)
    assert metrics["config"]["TEST"]["TTA"] and metrics["gmacs"] > 0
