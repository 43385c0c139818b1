"""DATA.PSEUDO_LABELS: what a model gives fills what is unknown in train, and nothing else; whom it has seen."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import predict
from common.errors import UserError
from common.files import sha256
from config import get_config, parse_args
from conftest import write_checkpoint
from dataset import nih
from dataset.build import build_datasets, own_values
from dataset.cxr_lt import TASKS
from dataset.labels import LABELS
from dataset.patients import patients_of
from dataset.pseudo_labels import fill_unknown
from dataset.tables import SPLITS

UNKNOWN = ("Enlarged Cardiomediastinum", "Fracture", "Support Devices")  # to NIH


@pytest.fixture(scope="module")
def given(layouts, tmp_path_factory):
    """The table that a drawn model predicts of all images of the NIH tree, and its checkpoint."""
    folder = tmp_path_factory.mktemp("given")
    path, _ = write_checkpoint(folder / "teacher.pth")
    torch.save(torch.load(path, weights_only=True) | {"patients": {"mimic_cxr": torch.tensor([1])}}, path)
    predict.main([str(path), str(layouts("nih")), "--output", str(folder / "p.csv")])
    return folder / "p.csv", path


@pytest.fixture
def own_given(given, tmp_path):
    """A copy of them that a test may change: (table, checkpoint, change(**content of the checkpoint))."""
    shutil.copytree(given[0].parent, tmp_path / "given")
    table, path, run = (tmp_path / "given" / name for name in ("p.csv", "teacher.pth", "run.json"))

    def change(**content):
        torch.save(torch.load(path, weights_only=True) | content, path)
        with open(path, "rb") as file:
            digest = sha256(file)
        entry = json.loads(run.read_text())
        entry["p.csv"]["command"]["checkpoints"], entry["p.csv"]["checkpoint_paths"] = [digest], [str(path)]
        run.write_text(json.dumps(entry))

    return table, path, change


def test_unknown_labels_of_train_alone_are_filled(layouts, given):
    table = nih.load_table(layouts("nih"), split_seed=0).with_targets()
    filled, record = fill_unknown(table, given[0])
    frame = pd.read_csv(given[0])
    rows = {path.rsplit("/", 1)[-1]: row for path, row in zip(frame["path"], frame.to_dict("records"))}
    train = table.split == SPLITS.index("train")
    for k, name in enumerate(LABELS):
        before, after = table.targets[:, k], filled.targets[:, k]
        if name in UNKNOWN:
            expected = [rows[image.decode()][name] if t else np.nan for image, t in zip(table.dicom_id, train)]
            np.testing.assert_array_equal(after, np.float32(expected))
        else:
            np.testing.assert_array_equal(after, before)
    count = int(train.sum())
    assert record["images"] == count and {n: record["filled"][n] for n in UNKNOWN} == dict.fromkeys(UNKNOWN, count)
    assert filled.notes[-1].startswith(
        f"DATA.PSEUDO_LABELS p.csv: {3 * count} unknown labels of {count} of the {count}"
    )
    assert np.isnan(table.targets[train][:, LABELS.index("Fracture")]).all()  # the given table is as it was


def test_images_are_known_by_the_end_of_their_paths(layouts, own_given):
    """Wherever the images lay, whatever their format; some may be without a row, some with an error."""
    path = own_given[0]
    table = nih.load_table(layouts("nih"), split_seed=0).with_targets()
    train = table.split == SPLITS.index("train")
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame["path"] = frame["path"].str.replace(".*/(images_0)", r"/elsewhere/\1", regex=True).str.replace("png", "jpg")
    fracture = LABELS.index("Fracture")
    first, second = (name.decode().removesuffix("png") for name in table.dicom_id[train][:2])
    frame = frame[~frame["path"].str.contains(first, regex=False)]
    frame.loc[frame["path"].str.contains(second, regex=False), list(LABELS)] = ""
    frame.to_csv(path, index=False)
    filled, record = fill_unknown(table, path)
    assert (
        np.isnan(filled.targets[train][:2, fracture]).all() and not np.isnan(filled.targets[train][2:, fracture]).any()
    )
    assert record["images"] == train.sum() - 2 and f"{2 * 3} stay unknown" in filled.notes[-1]


def test_faults_of_the_table(layouts, own_given, tmp_path):
    path, _, _ = own_given
    table = nih.load_table(layouts("nih"), split_seed=0).with_targets()
    original = pd.read_csv(path, dtype=str, keep_default_na=False)

    def refused(match, frame, table=table):
        frame.to_csv(path, index=False)
        with pytest.raises(UserError, match=match):
            fill_unknown(table, path)

    refused("has none of the labels Atelectasis, .*it has: path, error", original.drop(columns=list(LABELS)))
    refused(
        "has none of the .* training images, such as images_0",
        original.assign(path=[f"{k}.png" for k in range(len(original))]),
    )
    refused("Fracture is '1.5'; expected a probability from 0 to 1", original.assign(Fracture="1.5"))
    refused("Fracture is 'yes'", original.assign(Fracture="yes"))
    refused("Fracture is 'nan'", original.assign(Fracture="nan"))
    refused("column 'Fracture' is there more than once", pd.concat([original, original[["Fracture"]]], axis=1))
    refused(
        "has several rows; predict one release a table",
        pd.concat([original, original.assign(path="/b/" + original["path"])]),
    )
    refused("fills nothing: no label", original.drop(columns=list(UNKNOWN)))
    original.to_csv(path, index=False)
    (path.parent / "run.json").unlink()
    refused("run.json does not say which model predicted it", original)
    with pytest.raises(UserError, match="no.csv: cannot be read as CSV"):
        fill_unknown(table, tmp_path / "no.csv")


def test_a_run_records_its_pseudo_labels_and_whom_the_model_saw(run_main, layouts, given, own_given):
    options = {"DATA__DATASET": "nih", "data": layouts("nih"), "TRAIN__EPOCHS": 1, "DATA__BATCH_SIZE": 4}
    folder = run_main(**options, DATA__PSEUDO_LABELS=given[0])
    state = torch.load(folder / "last_ckpt.pth", weights_only=True)
    record = state["pseudo_labels"]["nih"]
    assert record["checkpoints"] == [str(given[1])] and record["filled"]["Fracture"] == record["images"] > 0
    assert state["patients"]["mimic_cxr"].tolist() == state["trained"]["mimic_cxr"].tolist() == [1]
    assert set(state["trained"]["nih"].tolist()) < set(state["patients"]["nih"].tolist())  # those of validation
    log = (folder / "log_rank0.txt").read_text()
    assert "DATA.PSEUDO_LABELS p.csv: " in log and "Fracture cannot be learnt" not in log
    run_main("--eval", **options, DATA__PSEUDO_LABELS=given[0])  # which needs neither the table nor its model

    # A model that has seen the test patients, or was trained on those of validation.
    table, path, change = own_given
    options |= {"DATA__PSEUDO_LABELS": table, "out": "other"}
    config = get_config(
        parse_args(["--cfg", str(run_main.cfg), "--dataset", "nih", "--data-path", str(layouts("nih"))])
    )
    validate, test = (patients_of(part, config) for part in build_datasets(config, "validate", "test"))
    for content, split in (
        ({"patients": test, "trained": {}}, "test"),
        ({"patients": validate, "trained": validate}, "validate"),
        ({"patients": validate}, "validate"),  # of a version before `trained`
    ):
        state = torch.load(path, weights_only=True)
        torch.save({k: v for k, v in state.items() if k != "trained"}, path)
        change(**content)
        with pytest.raises(
            UserError, match=f"its model .*teacher.pth has seen .* of the {split} split of nih, such as"
        ):
            run_main(**options)
    change(patients=validate, trained={})  # chosen by them: the first stage of the same split
    run_main(**options)
    change(patients=None)
    with pytest.raises(UserError, match="teacher.pth does not say on whom it was trained"):
        run_main(**options)
    torch.save({"other": 1}, path)
    with pytest.raises(UserError, match="teacher.pth has changed since"):
        run_main(**options)


def test_a_source_learns_the_labels_of_the_first_from_a_model(run_main, layouts, tmp_path):
    """NIH has none of most of CXR-LT's labels: all that it does not know comes from the table."""
    labels = TASKS["2024-1"]
    images = sorted(str(path) for path in layouts("nih").rglob("*.png"))
    values = np.random.default_rng(1).random((len(images), len(labels))).round(4)
    frame = pd.DataFrame({"path": images, "error": "", **dict(zip(labels, values.T))})
    frame.to_csv(tmp_path / "p.csv", index=False)
    entry = {"checkpoint_paths": ["a.pth"], "command": {"checkpoints": ["0"]}}
    (tmp_path / "run.json").write_text(json.dumps({"p.csv": entry}))
    sources = [
        {"dataset": "cxr_lt", "path": str(layouts("cxr_lt"))},
        {"dataset": "nih", "path": str(layouts("nih")), "pseudo_labels": str(tmp_path / "p.csv")},
    ]

    def build(*splits, **opts):
        pairs = {"DATA.SOURCES": json.dumps(sources), "MODEL.NUM_CLASSES": "40", **opts}
        args = ["--cfg", str(run_main.cfg), "--opts", *(text for pair in pairs.items() for text in pair)]
        return build_datasets(get_config(parse_args(args), own_values), *splits)

    train, validate = build("train", "validate")
    assert train.label_names == labels and train.primary_metric == "average_precision"
    part, rows = train.parts["nih"], {path.rsplit("/", 1)[-1]: row for path, row in zip(images, values)}
    for name, own in {"Tortuous Aorta": None, "Support Devices": None, "Mass": "Mass", "Edema": "Edema"}.items():
        k = labels.index(name)
        expected = np.float32([rows[image][k] for image in part.ids()["dicom_id"]])
        assert np.array_equal(part.targets[:, k], expected) == (own is None), name
        assert set(part.targets[:, k]) <= {0, 1} or own is None
        assert np.isnan(validate.parts["nih"].targets[:, k]).all() == (own is None)
    assert part.pseudo_labels["filled"]["Tortuous Aorta"] == len(part)
    with pytest.raises(UserError, match="p.csv: neither it nor the data has the label 'Aorta'"):
        sources[0] |= {"dataset": "nih", "path": str(layouts("nih")), "pseudo_labels": str(tmp_path / "p.csv")}
        sources.pop()
        build("train", **{"DATA.LABELS": "[Aorta, Edema]", "MODEL.NUM_CLASSES": "2"})
