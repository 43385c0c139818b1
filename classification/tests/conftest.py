"""Shared by all tests: one small synthetic tree, one tiny configuration, few threads."""

import functools
import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parents[1] / "shared"

# The smallest model with all four levels; a batch takes some 50 ms on one core.
TINY = """
DATA: {DATASET: mimic_cxr, BATCH_SIZE: 16, IMG_SIZE: 32, NUM_WORKERS: 0}
MODEL:
  NAME: tiny
  NUM_CLASSES: 14
  DROP_PATH_RATE: 0.2
  INTERN_IMAGE: {CHANNELS: 16, DEPTHS: [1, 1, 1, 1], GROUPS: [1, 2, 4, 8]}
TRAIN:
  EPOCHS: 2
  WARMUP_EPOCHS: 1
  BASE_LR: 0.001
  LR_REFERENCE_BATCH: 16
  EMA: {ENABLE: True, DECAY: 0.9}
AUG: {COLOR_JITTER: 0.1, AUTO_AUGMENT: "", CROP_SCALE: [0.8, 1.0], HFLIP: 0.0, MIXUP: 0.0, CUTMIX: 0.0, REPROB: 0.3}
TEST: {CROP: False, REPORT: False}
AMP_OPT_LEVEL: O0
SEED: 7
"""


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def unflushed():
    """No test cuts the power, so none waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


class Undrawn(Figure):
    """A figure that is made as any other, and saved as an empty file."""

    def savefig(self, path, **_):
        Path(path).touch()


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """The figures of `analysis` are made and not drawn, which takes longer than a training; `drawn` draws them."""
    from analysis import figures

    plt = figures.plt
    figures.plt = SimpleNamespace(
        subplots=functools.partial(plt.subplots, FigureClass=Undrawn), rc_context=plt.rc_context, close=plt.close
    )
    yield plt
    figures.plt = plt


@pytest.fixture
def drawn(undrawn, monkeypatch):
    """In this test figures are drawn as well."""
    monkeypatch.setattr("analysis.figures.plt", undrawn)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A synthetic MIMIC-CXR tree of 40 patients; not to be changed (see `own_tree`)."""
    from dataset.synthetic.tree import write_tree

    root = tmp_path_factory.mktemp("mimic")
    write_tree(root, patients=40, size=64, progress=False)
    return root


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """layouts("nih"): a small synthetic tree (20 patients, 64 pixels) in the layout of a release, or of "mimic": the
    same pictures. Not to be changed."""
    from dataset.synthetic.tree import write_tree

    trees = {}

    def tree(layout):
        if layout not in trees:
            trees[layout] = tmp_path_factory.mktemp(layout)
            few = {"patients": 20, "size": 64, "studies": (1, 1), "images": (1, 2)}
            write_tree(trees[layout], layout=layout, progress=False, **few)
        return trees[layout]

    return tree


@pytest.fixture
def own_tree(tree, tmp_path):
    """A copy of the tree that a test may damage."""
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    return root


@pytest.fixture
def tiny(tmp_path):
    """Path of the tiny configuration."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def run_main(tiny, tree, tmp_path):
    """main() in this process on the small tree: run_main("--eval", out="a", data=...) -> the run's folder."""
    import main

    def run(*flags, out="out", data=tree, **opts):
        argv = ["--cfg", str(tiny), "--data-path", str(data), "--output", str(tmp_path / out), *map(str, flags)]
        pairs = {"RESULTS": tmp_path / out / "results", "PRINT_FREQ": 1, **opts}
        argv += ["--opts", *(str(x) for k, v in pairs.items() for x in (k.replace("__", "."), v))]
        run.status = main.main(argv)
        return tmp_path / out / "tiny" / "default"

    run.cfg = tiny
    return run


@pytest.fixture(scope="session")
def trained_once(tree, tmp_path_factory):
    """The folder of run_main(TRAIN__EPOCHS=1); not to be changed (see `one_epoch`)."""
    import main

    base = tmp_path_factory.mktemp("one_epoch")
    (base / "tiny.yaml").write_text(TINY)
    argv = ["--cfg", str(base / "tiny.yaml"), "--data-path", str(tree), "--output", str(base / "out")]
    assert main.main([*argv, "--opts", "TRAIN.EPOCHS", "1", "PRINT_FREQ", "1"]) == 0
    return base / "out" / "tiny" / "default"


@pytest.fixture
def one_epoch(trained_once, run_main, tmp_path):
    """A copy of it where run_main(out="out") has its run."""
    return shutil.copytree(trained_once, tmp_path / "out" / "tiny" / "default")


def edit_csv(root, kind, change):
    """Apply `change` to the table `mimic-cxr-*-<kind>.csv.gz` under root."""
    path = next(Path(root).glob(f"mimic-cxr-*-{kind}.csv.gz"))
    frame = change(pd.read_csv(path, dtype=object))
    with gzip.open(path, "wt") as file:
        frame.to_csv(file, index=False)
    return path


def epochs(folder):
    """The lines of metrics.jsonl, without what depends on the machine and its clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_the_machine = {"seconds", "images_per_s", "waited", "peak_memory_gb"}
    return [{k: v for k, v in line.items() if k not in of_the_machine} for line in lines]


def write_checkpoint(path, *, seed=3, intern_image=(), labels=None, ema_seed=None, domain="", **opts):
    """A checkpoint of the tiny model with drawn weights, as main.py would write it: (path, model in eval mode).

    intern_image: keys below MODEL.INTERN_IMAGE; opts: further keys with __ for the dot; ema_seed: of an average in it.
    """
    import torch
    import yaml

    import config as config_module
    from dataset.labels import LABELS
    from models import build_model
    from test_model import fill

    content = yaml.safe_load(TINY)
    content["MODEL"]["INTERN_IMAGE"].update(intern_image)
    for key, value in {k.replace("__", "."): v for k, v in opts.items()}.items():
        *parents, name = key.split(".")
        node = content
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    labels = list(labels or LABELS)
    content["MODEL"]["NUM_CLASSES"] = len(labels)
    config = config_module.from_dict(content, "test")
    weights = {}
    for name, number in {"model": seed, "model_ema": ema_seed}.items():
        if number is not None:
            model = build_model(config).eval()
            fill(model, number)
            weights[name] = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(weights["model"])
    state = {"model_ema": None, **weights, "label_names": labels, "config": config_module.to_dict(config)}
    state |= {"epoch": 2, "domain": domain}
    torch.save(state, path)
    return path, model


def signalled(monkeypatch, target, name, at, number=signal.SIGTERM):
    """The `at`-th call of target.name is preceded by a signal to this process."""
    original, calls = getattr(target, name), []

    def called(*a, **k):
        calls.append(0)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return original(*a, **k)

    monkeypatch.setattr(target, name, called)
    return calls
