"""Several releases at once, and one model on all of them: the same pictures in every layout get the same probabilities."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import main
import predict
from config import get_config
from conftest import TINY, epochs
from dataset.build import SeededDataset, TrainSampler, build_datasets
from dataset.domain import domain_warning
from dataset.labels import LABELS
from dataset.synthetic_layouts import LAYOUTS
from errors import UserError

OTHERS = [name for name in LAYOUTS if name != "mimic"]
# Labels that every release but MIMIC's own form knows in its own words.
UNKNOWN = {
    "nih": ("Enlarged Cardiomediastinum", "Fracture", "Support Devices"),
    "vindr": ("Enlarged Cardiomediastinum", "Support Devices"),
}


def text_of(sources):
    return json.dumps(sources)


@pytest.fixture
def pair(layouts):
    return [{"dataset": "mimic_cxr", "path": str(layouts("mimic"))}, {"dataset": "nih", "path": str(layouts("nih"))}]


@pytest.fixture
def load(tiny):
    def load(sources, **opts):
        pairs = {"DATA.SOURCES": text_of(sources), "DATA.BATCH_SIZE": 4, **{k.replace("__", "."): v for k, v in opts.items()}}
        return get_config(Namespace(cfg=tiny, opts=[str(x) for pair in pairs.items() for x in pair]))

    return load


@pytest.fixture(scope="module")
def run(layouts, tmp_path_factory):
    """run(*flags, name=, **opts) -> folder of results or of the run; the tiny model on the trees of `layouts`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(TINY)

    def run(*flags, name, **opts):
        pairs = {"RESULTS": folder / name / "results", "PRINT_FREQ": 1, "DATA.BATCH_SIZE": 4, "TRAIN.EPOCHS": 1}
        pairs |= {"TRAIN.EMA.ENABLE": False, "TRAIN.WARMUP_EPOCHS": 0, **{k.replace("__", "."): v for k, v in opts.items()}}
        argv = ["--cfg", str(folder / "tiny.yaml"), "--output", str(folder / name), *map(str, flags)]
        assert main.main([*argv, "--opts", *(str(x) for pair in pairs.items() for x in pair)]) == 0
        return folder / name / "tiny" / "default"

    run.results = lambda name: max((folder / name / "results").iterdir())
    return run


@pytest.fixture(scope="module")
def trained(run, layouts):
    """Checkpoint of a model trained on the MIMIC layout."""
    return run("--data-path", layouts("mimic"), name="mimic") / "last_ckpt.pth"


@pytest.fixture(scope="module")
def expected(trained, layouts, tmp_path_factory):
    """Probabilities [14] by dicom_id of every picture, by predict.py on the JPGs of the MIMIC layout."""
    table = tmp_path_factory.mktemp("predicted") / "p.csv"
    predict.main([str(trained), str(layouts("mimic") / "files"), "--output", str(table)])
    frame = pd.read_csv(table)
    return {Path(path).stem: values for path, values in zip(frame["path"], frame[list(LABELS)].to_numpy())}


# ------------------------------------------------------------------------------------------- one model, all layouts
@pytest.mark.parametrize("layout", OTHERS)
def test_a_model_scores_the_same_pictures_alike_in_every_layout(run, trained, expected, layouts, layout):
    root, options = layouts(layout), {"padchest": {"DATA.LABELLED_BY": "all"}}.get(layout, {})
    run("--eval", "--resume", trained, "--dataset", layout, "--data-path", root, name=layout, **options)
    ids = pd.read_csv(root / "as_mimic.csv").set_index("image")["dicom_id"]
    table = pd.read_csv(run.results(layout) / "predictions.csv")
    split = pd.read_csv(layouts("mimic") / "mimic-cxr-2.0.0-split.csv.gz").set_index("dicom_id")["split"]
    of_test = set(ids) if layout in ("padchest", "brax") else set(ids[ids.map(split).eq("test").to_numpy()])
    assert set(ids[table["path"]]) == of_test and len(table) == len(of_test) > 0
    compared = 0
    for row, path in enumerate(table["path"]):
        dicom_id = ids[path]
        with Image.open(next(layouts("mimic").glob(f"files/*/*/*/{dicom_id}.jpg"))) as image:
            full = image.getextrema() == (0, 255)  # else a 16-bit PNG is read with more contrast
        if full or layout != "padchest":
            found = [table[f"{label}_probability"][row] for label in LABELS]
            np.testing.assert_allclose(found, expected[dicom_id], atol=1e-6, rtol=0)
            compared += 1
    assert compared > 0.7 * len(table)
    metrics = json.loads((run.results(layout) / "metrics.json").read_text())
    for label in LABELS:
        known = metrics["positives"][label] + metrics["negatives"][label]
        assert known == (0 if label in UNKNOWN.get(layout, ()) else len(table)), label
