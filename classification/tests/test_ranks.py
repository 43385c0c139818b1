"""Several ranks, by DDP and by TRAIN.FSDP: the losses of one process, sharded checkpoints, and what goes wrong."""

import errno
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import export
import main
import predict
from common.errors import UserError
from conftest import ROOT, TINY, epochs, signalled
from dataset.labels import LABELS
from test_step import traced  # noqa: F401  (a fixture)
from test_training import assert_same_run
from training import checkpoint, sharding
from utils_multilabel import LOSSES, bce

FSDP = ("TRAIN.FSDP", "True")
# Without random numbers in the model, which differ between ranks, and with as many known labels on no two ranks.
SAME = "MODEL.DROP_PATH_RATE 0 DATA.UNCERTAIN ignore DATA.MISSING ignore DATA.LIMIT 60 EVAL_FREQ 2 SAVE_FREQ 2"
TIMM = ("MODEL.TYPE", "timm", "MODEL.TIMM.NAME", "test_resnet")


# ----------------------------------------------------------------------------------- several ranks
@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory):
    """Runs of ten updates of six images an epoch, two epochs, on one to three ranks: trained(name) -> what it left."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "tiny.yaml").write_text(TINY)

    def job(name, ranks, *opts, folder=None, batch=None, **more):
        argv = ["--cfg", root / "tiny.yaml", "--data-path", tree, "--output", root / (folder or name)]
        argv += ["--batch-size", batch or 6 // ranks, "--opts", *SAME.split(), "RESULTS", root / name, *opts]
        return {"ranks": ranks, "argv": [*map(str, argv)], "out": str(root / f"{name}.json"), **more}

    quick = ("TRAIN.EMA.ENABLE", "False")
    # Some 50 studies, of which those of three images get two anew in each epoch.
    studies = "DATA.UNIT study DATA.MAX_VIEWS 2 MODEL.FUSION attention MODEL.HEAD_WIDTH 32 DATA.LIMIT 100".split()
    studies += ["TRAIN.ACCUMULATION_STEPS", "2"]
    jobs = [
        job("one", 1, *quick),
        job("ddp2", 2, *quick),
        job("ddp3", 3, *quick),
        job("fsdp3", 3, *FSDP),
        # Stopped where an epoch is trained and not yet validated.
        job("stopped", 3, *FSDP, signal=[10, 1, signal.SIGTERM]),
        {"copy": [str(root / "stopped"), str(root / "fewer")]},
        job("resumed", 3, *FSDP, folder="stopped"),
        job("fewer", 2, *FSDP),
        job("killed", 3, *FSDP, signal=[2, 1, signal.SIGKILL]),
        job("evaluated", 3, "DATA.LIMIT", "2", "EVAL_MODE", "True", folder="fewer"),
        # Updates of two batches of four studies.
        job("alone", 1, *studies, batch=4),
        job("apart", 2, *studies, batch=2),
        job("halted", 2, *studies, batch=2, signal=[4, 1, signal.SIGTERM]),
        job("continued", 2, *studies, batch=2, folder="halted"),
        job("timm", 2, "TRAIN.EPOCHS", "1", *TIMM, *quick),
    ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "ranks.py", root / "jobs.json"]
    subprocess.run(command, cwd=root, env=env, stdout=subprocess.DEVNULL, check=True)
    ended = dict(zip((job.get("out") for job in jobs), json.loads((root / "jobs.json").read_text())))

    def of(name):
        path = root / f"{name}.json"
        return {
            "folder": root / name / "tiny" / "default",
            "updates": np.array(json.loads(path.read_text())) if path.exists() else None,
            "status": ended[str(path)],
            "errors": [p.read_text() for p in sorted(root.glob(f"{name}.json.rank*"))],
        }

    return of


@pytest.mark.parametrize("name", ["ddp2", "ddp3", "fsdp3"])
def test_losses_and_norms_are_those_of_one_process(trained, name):
    one, several = trained("one")["updates"], trained(name)["updates"]
    assert several.shape == one.shape == (20, 2)
    np.testing.assert_allclose(several, one, atol=1e-5)
    a, b = (epochs(trained(n)["folder"]) for n in ("one", name))
    for one, several in zip(a, b, strict=True):  # of the shared validation too
        assert several["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)


def test_a_sharded_run_that_was_stopped_resumes_exactly(trained):
    assert trained("stopped")["status"] == [128 + signal.SIGTERM] * 3 and len(trained("resumed")["updates"]) == 10
    assert_same_run(trained("stopped")["folder"], trained("fsdp3")["folder"])


def test_fewer_ranks_continue_what_more_have_saved(trained):
    fewer = trained("fewer")
    np.testing.assert_allclose(fewer["updates"], trained("one")["updates"][10:], atol=1e-5)
    a, b = (epochs(trained(name)["folder"])[-1]["val_loss"] for name in ("one", "fewer"))
    assert b == pytest.approx(a, abs=1e-5)
    assert "was saved by 3 processes, now 2: random numbers restart" in (fewer["folder"] / "log_rank0.txt").read_text()
    named = {torch.load(p, weights_only=True)["shards"]["folder"] for p in fewer["folder"].glob("*.pth")}
    assert named == {p.name for p in (fewer["folder"] / "shards").iterdir()}  # and nothing that no checkpoint names


def test_a_killed_rank_is_one_line(trained):
    killed = trained("killed")
    assert killed["status"] == [2, -signal.SIGKILL, 1]
    lines = [line for line in "".join(killed["errors"]).splitlines() if line.startswith("error: ")]
    assert lines == ["error: " + sharding.distributed.LOSS_OF_PEER]


def test_studies_on_two_ranks_with_accumulated_gradients_and_a_signal_to_one(trained):
    """The losses of one rank, and after a resume within an epoch the same run to the bit."""
    alone, apart, halted, continued = map(trained, ("alone", "apart", "halted", "continued"))
    np.testing.assert_allclose(apart["updates"], alone["updates"], atol=1e-5)
    for one, two in zip(epochs(alone["folder"]), epochs(apart["folder"]), strict=True):
        assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)
    count = len(alone["updates"]) // 2
    assert count > 4 and halted["status"] == [128 + signal.SIGTERM] * 2
    assert len(continued["updates"]) == 2 * count - 4
    assert_same_run(halted["folder"], apart["folder"])


def test_validation_is_that_of_the_checkpoint(trained, tree, tmp_path, tiny):
    """With statistics of its own on each rank, which timm's norms have: rank 0's, for all images."""
    folder = trained("timm")["folder"].parents[1] / "test_resnet" / "default"
    argv = ["--cfg", tiny, "--data-path", tree, "--eval", "--resume", folder / "last_ckpt.pth", "--opts", *SAME.split()]
    assert main.main([*map(str, [*argv, *TIMM, "RESULTS", tmp_path / "results"])]) == 0
    table = pd.read_csv(next((tmp_path / "results").glob("*/predictions_validate.csv")))
    p, t = (torch.tensor(table[[f"{n}_{kind}" for n in LABELS]].to_numpy()) for kind in ("probability", "target"))
    loss = torch.nn.functional.binary_cross_entropy(p[~t.isnan()], t[~t.isnan()])
    assert epochs(folder)[0]["val_loss"] == pytest.approx(float(loss), rel=2e-6)


def test_more_ranks_than_images_evaluate(trained):
    found = trained("evaluated")
    assert found["status"] == [0, 0, 0]
    results = next((found["folder"].parents[1]).glob("evaluation_*/metrics.json"))
    assert json.loads(results.read_text())["images"] == 2


# ------------------------------------------------------------------------------ a group of one rank
@pytest.fixture
def alone(run_main, monkeypatch):
    """run_main as torchrun starts it on one device, with TRAIN.FSDP, for three updates."""

    def run(*flags, out="sharded", **opts):
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        where = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        with monkeypatch.context() as patch:
            for key, value in where.items():
                patch.setenv(key, str(value))
            return run_main(*flags, out=out, **FEW | {"TRAIN__FSDP": True} | opts)

    return run


class Scaled(torch.nn.Module):
    """A loss with a parameter per label, which is in no shard."""

    def __init__(self, known):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(len(known)))

    def forward(self, logits, targets):
        return bce(logits * self.scale, targets)


FEW = {"TRAIN__EPOCHS": 1, "DATA__LIMIT": 24, "DATA__BATCH_SIZE": 8}


@pytest.mark.parametrize(
    "options",
    [
        {"TRAIN__USE_CHECKPOINT": True, "MODEL__DROP_PATH_RATE": 0.0},
        {"TRAIN__ACCUMULATION_STEPS": 3, "TRAIN__OPTIMIZER__NAME": "sgd"},
        {"TRAIN__FREEZE": "[patch_embed, levels.0]", "TRAIN__CLIP_GRAD": 0.1},
        {"AMP_OPT_LEVEL": "O1", "AMP_DTYPE": "bfloat16"},
        {"AMP_OPT_LEVEL": "O1", "AMP_DTYPE": "float16"},
        {"MODEL__HEAD": "label_attention", "TRAIN__FSDP_OFFLOAD": True},
        {"TRAIN__LOSS": "scaled", "TRAIN__CLIP_GRAD": 0.1},
        {"TRAIN__COMPILE": True, "MODEL__DROP_PATH_RATE": 0.0},
        {"MODEL__TYPE": "timm", "MODEL__TIMM__NAME": "test_resnet", "MODEL__NAME": "tiny"},
    ],
    ids=lambda options: " ".join(options),
)
def test_an_option_does_the_same_in_shards(alone, run_main, options, traced, monkeypatch):  # noqa: F811
    monkeypatch.setitem(LOSSES, "scaled", Scaled)
    close = 2e-2 if "AMP_DTYPE" in options else 1e-5  # norms have weights of 16 bits there
    (plain,), (sharded,) = epochs(run_main(**FEW | options)), epochs(alone(**options))
    for key in ("train_loss", "grad_norm", "val_loss"):
        assert sharded[key] == pytest.approx(plain[key], rel=close), key
    assert sharded["ema"]["val_loss"] == pytest.approx(plain["ema"]["val_loss"], rel=close)


def test_a_sharded_checkpoint_is_one_like_any_other(alone, run_main, tree, tmp_path):
    """Read as it is, made one file, continued without shards, and what was whole continued in them."""
    folder, files = alone(), {}
    for name in ("best_ckpt.pth", "ema_best_ckpt.pth"):
        files[name] = tmp_path / f"whole_{name}"
        assert export.main([str(folder / name), "--format", "checkpoint", "--output", str(files[name])]) == 0
        shards, whole = checkpoint.read(folder / name), torch.load(files[name], weights_only=True)
        assert "shards" not in whole and shards.keys() == whole.keys()
        assert all(torch.equal(whole["model"][k], v) for k, v in shards["model"].items())
    ema = checkpoint.read(folder / "best_ckpt.pth")["model_ema"]
    assert all(torch.equal(v, ema[k]) for k, v in whole["model"].items())

    image, tables = next(tree.rglob("*.jpg")), []
    for number, path in enumerate((folder / "best_ckpt.pth", files["best_ckpt.pth"])):
        assert predict.main([str(path), str(image), "--output", str(tmp_path / f"{number}.csv")]) == 0
        run_main("--eval", "--resume", path, RESULTS=tmp_path / f"results{number}")
        metrics = json.loads(next((tmp_path / f"results{number}").glob("*/metrics.json")).read_text())
        tables.append((pd.read_csv(tmp_path / f"{number}.csv"), metrics["auc"], metrics["loss"]))
    assert tables[0][0].equals(tables[1][0]) and tables[0][1:] == tables[1][1:]

    more = FEW | {"TRAIN__EPOCHS": 2}
    resumed = [
        run_main("--resume", files["best_ckpt.pth"], out="plain", **more),
        run_main("--resume", folder / "best_ckpt.pth", out="read", **more),
        alone("--resume", files["best_ckpt.pth"], out="whole", TRAIN__EPOCHS=2),
        alone(TRAIN__EPOCHS=2),
    ]
    second = [epochs(f)[-1] for f in resumed]
    for line in second:
        assert line["epoch"] == 2 and line["train_loss"] == pytest.approx(second[0]["train_loss"], rel=1e-6)
        assert line["ema"]["val_loss"] == pytest.approx(second[0]["ema"]["val_loss"], rel=1e-6)


def test_shards_that_are_lost_damaged_or_hostile_are_one_line(alone, tmp_path):
    folder = alone()
    state = torch.load(folder / "last_ckpt.pth", weights_only=True)
    shards = folder / "shards" / state["shards"]["folder"]
    part, table = shards / "__0_0.distcp", shards / ".metadata"
    kept = table.read_bytes()

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hostile"),)

    table.write_bytes(pickle.dumps(Hostile()))
    with open(table, "rb") as file:
        files = state["shards"]["files"] | {".metadata": sharding.sha256(file)}
    torch.save(state | {"shards": state["shards"] | {"files": files}}, folder / "hostile.pth")
    with pytest.raises(UserError, match="hostile.pth is not a whole checkpoint .it names posix.mkdir"):
        checkpoint.read(folder / "hostile.pth")
    assert not (tmp_path / "hostile").exists()

    table.write_bytes(kept)
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=f"{part} is not as it was written .a bad copy or disk"):
        checkpoint.read(folder / "last_ckpt.pth")
    part.unlink()
    lost = f"{part} cannot be read .No such file or directory.; keep the folder shards/{shards.name} beside it"
    with pytest.raises(UserError, match=lost):
        export.main([str(folder / "last_ckpt.pth"), "--format", "checkpoint", "--output", str(tmp_path / "a.pth")])
    alone(TRAIN__EPOCHS=2)
    log = (folder / "log_rank0.txt").read_text()
    assert (
        re.search(lost + ".* - falling back", log)
        and "resumed from" in log
        and "previous.pth: epoch 1, update 4" in log
    )
    assert [line["epoch"] for line in epochs(folder)] == [1, 2]


def test_a_full_disk_leaves_the_checkpoints_before(alone, monkeypatch):
    folder, save = alone(), sharding.dcp.FileSystemWriter.write_data
    before = sorted(p.name for p in (folder / "shards").iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sharding.dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(UserError, match="shards could not be written .No space left on device.; make room"):
        alone(TRAIN__EPOCHS=2)
    assert sorted(p.name for p in (folder / "shards").iterdir()) == before
    monkeypatch.setattr(sharding.dcp.FileSystemWriter, "write_data", save)
    assert [line["epoch"] for line in epochs(alone(TRAIN__EPOCHS=2))] == [1, 2]


def test_a_sharded_run_resumes_within_an_epoch(alone, monkeypatch):
    whole = alone(out="whole")
    with monkeypatch.context() as patch:
        signalled(patch, torch.optim.AdamW, "step", 2)
        folder = alone()
    assert checkpoint.read(folder / checkpoint.LAST)["update"] == 2
    assert_same_run(alone(), whole)


def test_shards_need_a_group(run_main):
    with pytest.raises(UserError, match="TRAIN.FSDP True needs a process per GPU; start them with .python -m jobs.la"):
        run_main(TRAIN__FSDP=True)
