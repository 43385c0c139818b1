"""Several releases at once, and one model on each: the same pictures in every layout get the same probabilities."""

import json
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import main
import predict
from analysis.evaluation import read_predictions
from analysis.groups import find_groups
from common.errors import UserError
from config import get_config
from conftest import TINY, epochs, signalled
from dataset.build import SeededDataset, TrainSampler, build_datasets, fingerprint
from dataset.files.domain import domain_warning
from dataset.labels import LABELS
from dataset.synthetic.layouts import LAYOUTS
from dataset.tables import EmptySplit
from training import checkpoint

OTHERS = [name for name in LAYOUTS if name not in ("mimic", "cxr_lt")]  # whose patients are the same
# Labels that every release but MIMIC's own form knows in its own words.
UNKNOWN = {
    "nih": ("Enlarged Cardiomediastinum", "Fracture", "Support Devices"),
    "vindr": ("Enlarged Cardiomediastinum", "Support Devices"),
}


@pytest.fixture(scope="module")
def pair(layouts):
    return [{"dataset": "mimic_cxr", "path": str(layouts("mimic"))}, {"dataset": "nih", "path": str(layouts("nih"))}]


@pytest.fixture
def load(tiny):
    def load(sources, **opts):
        pairs = {"DATA.SOURCES": json.dumps(sources), **{k.replace("__", "."): v for k, v in opts.items()}}
        return get_config(Namespace(cfg=tiny, opts=[str(x) for pair in pairs.items() for x in pair]))

    return load


@pytest.fixture(scope="module")
def run(layouts, tmp_path_factory):
    """run(*flags, name=, **opts) -> folder of results or of the run; the tiny model on the trees of `layouts`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(TINY)

    def run(*flags, name, status=0, **opts):
        pairs = {"RESULTS": folder / name / "results", "PRINT_FREQ": 1, "DATA.BATCH_SIZE": 4, "TRAIN.EPOCHS": 1}
        pairs |= {"TRAIN.EMA.ENABLE": False, **{k.replace("__", "."): v for k, v in opts.items()}}
        argv = ["--cfg", str(folder / "tiny.yaml"), "--output", str(folder / name), *map(str, flags)]
        assert main.main([*argv, "--opts", *(str(x) for pair in pairs.items() for x in pair)]) == status
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
            inner = np.percentile(np.asarray(image), (0.1, 99.9), method="nearest")
            full = inner.tolist() == [0, 255]  # else a 16-bit PNG is read with more contrast
        if full or layout != "padchest":
            found = [table[f"{label}_probability"][row] for label in LABELS]
            np.testing.assert_allclose(found, expected[dicom_id], atol=1e-6, rtol=0)
            compared += 1
    assert compared > 0.7 * len(table) or layout == "padchest"  # whose pixels test_layouts compares
    metrics = json.loads((run.results(layout) / "metrics.json").read_text())
    for label in LABELS:
        known = metrics["positives"][label] + metrics["negatives"][label]
        assert known == (0 if label in UNKNOWN.get(layout, ()) else len(table)), label


# ------------------------------------------------------------------------------------------- the union
def test_the_union_is_its_sources_one_after_the_other(load, pair):
    both = build_datasets(load(pair), "train", "validate")
    alone = [build_datasets(load([source]), "train", "validate") for source in pair]
    for k, union in enumerate(both):
        mimic, nih = (datasets[k] for datasets in alone)
        assert list(union.sources) == ["mimic_cxr"] * len(mimic) + ["nih"] * len(nih)
        np.testing.assert_array_equal(union.targets, np.concatenate([mimic.targets, nih.targets]))
        for column in ("dicom_id", "study_id", "subject_id"):
            assert union.ids()[column] == mimic.ids()[column] + nih.ids()[column]
    train, nih = both[0], alone[1][0]
    last, unknown = len(train) - 1, np.isnan(train.targets)
    image, target, index = SeededDataset(train, 5)[0, last]
    assert index == last and image.dtype == torch.uint8
    np.testing.assert_array_equal(target, nih.targets[-1])
    assert sorted(np.array(LABELS)[unknown[last]]) == sorted(UNKNOWN["nih"])
    assert not unknown[train.sources == "mimic_cxr"].any()
    assert set(train.ids()["subject_id"][0].split(":")[:1]) == {"mimic_cxr"}
    assert Path(train.descriptions()["path"][last]).is_file() and train.descriptions()["source"][last] == "nih"
    counts = train.cohort["splits"]["train"]
    assert counts["images"] == len(train) and counts["groups"]["source"]["nih"]["images"] == len(nih)
    assert counts["labels"]["Fracture"]["known"] == len(train) - len(nih)
    assert train.label_mapping["Fracture"] == {"from": ["mimic_cxr: Fracture"], "kind": "exact"}
    assert train.label_mapping["Lung Lesion"]["kind"] == "approximate"
    assert "together" in train.summary and "unknown to nih, masked in loss and metrics" in train.summary


def own_table(root, subjects):
    root.mkdir()
    lines = ["path,subject_id,split,Edema"]
    for k, subject in enumerate(subjects):
        Image.fromarray(np.full((40, 40), 3 * k, np.uint8)).save(root / f"{k}.png")
        lines.append(f"{k}.png,{subject},{('train', 'validate', 'test')[k % 3]},{k % 2}")
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return str(root)


def test_the_same_id_in_two_releases_is_not_the_same_patient(load, tmp_path):
    """A patient of train in one, of test in the other; in one release that is a leak, and named with its source."""
    sources = [
        {"dataset": "mimic_cxr", "path": own_table(tmp_path / "a", "abcdef"), "name": "here"},
        {"dataset": "mimic_cxr", "path": own_table(tmp_path / "b", "ghijkl"), "name": "there"},
    ]
    opts = {"DATA__LABELS": "[Edema]", "MODEL__NUM_CLASSES": 1}
    train, validate = build_datasets(load(sources, **opts), "train", "validate")
    assert train.ids()["subject_id"] == ["here:a", "here:d", "there:g", "there:j"]
    assert validate.ids()["dicom_id"] == ["here:1.png", "here:4.png", "there:1.png", "there:4.png"]
    sources[1]["path"] = own_table(tmp_path / "c", "gghijk")
    with pytest.raises(UserError, match=r"^DATA.SOURCES there: 1 patient\(s\) are in more than one split"):
        build_datasets(load(sources, **opts), "train", "validate")


def test_a_source_may_lack_a_split_of_its_own(load, tmp_path):
    sources = [
        {"dataset": "mimic_cxr", "path": own_table(tmp_path / "a", "abcdef"), "name": "here"},
        {"dataset": "mimic_cxr", "path": own_table(tmp_path / "b", "ghijkl"), "name": "there"},
    ]
    table = tmp_path / "b" / "table.csv"
    table.write_text(table.read_text().replace("validate", "train"))
    config = load(sources, DATA__LABELS="[Edema]", MODEL__NUM_CLASSES=1)
    train, validate = build_datasets(config, "train", "validate")
    assert list(train.sources) == ["here"] * 2 + ["there"] * 4 and set(validate.sources) == {"here"}
    assert any(text.startswith("DATA.SOURCES there has no part in validate: ") for text in train.warnings)
    table.write_text(table.read_text().replace("train", "test"))
    with pytest.raises(UserError, match="^DATA.SOURCES there: .*split 'train' has no image"):
        build_datasets(config, "train", "validate")
    table = tmp_path / "a" / "table.csv"
    table.write_text(table.read_text().replace("validate", "train"))
    with pytest.raises(EmptySplit, match="none of DATA.SOURCES has an image of the split 'validate'"):
        build_datasets(config, "test", "validate")


def test_images_of_a_source_without_patients_are_patients_of_their_own(load, layouts):
    sources = [{"dataset": "nih", "path": str(layouts("nih"))}, {"dataset": "vindr", "path": str(layouts("vindr"))}]
    (train,) = build_datasets(load(sources), "train")
    ids, of_vindr = pd.DataFrame(train.ids()), train.sources == "vindr"
    assert (ids["subject_id"] == ids["dicom_id"])[of_vindr].all() and ids["subject_id"][of_vindr].is_unique
    assert not (ids["subject_id"] == ids["dicom_id"])[~of_vindr].any()
    (warning,) = [text for text in train.warnings if "image domains" in text]
    assert "nih pictures; vindr dicom window" in warning and train.domain == "dicom window and pictures"
    (train,) = build_datasets(load(sources, DATA__DICOM_RECIPE="mimic_jpg"), "train")
    assert not any("image domains" in text for text in train.warnings)


def test_a_model_of_two_domains_knows_each():
    both = "dicom window and pictures"
    for here, told in ((both, False), ("pictures", False), ("dicom mimic_jpg", False), ("dicom window", False)):
        assert bool(domain_warning(both, here)) == told
    assert domain_warning("pictures", both) and domain_warning("dicom mimic_jpg and pictures", "dicom window")


def test_what_one_source_cannot_teach_another_may(load, layouts, pair):
    (nih,) = build_datasets(load(pair[1:]), "train")
    (both,) = build_datasets(load(pair, DATA__MISSING="ignore"), "train")
    assert not any("Fracture" in text for text in nih.warnings + both.warnings)
    assert [text for text in both.warnings if text.startswith("No Finding cannot")] == []  # 0 in NIH's words


@pytest.mark.parametrize(
    "entries, named",
    [
        ("[mimic_cxr]", "DATA.SOURCES is ['mimic_cxr']; source 1 must be a mapping such as {dataset: mimic_cxr, path:"),
        ("[{path: A}]", "source 1 needs a text as dataset"),
        ("[{dataset: nih}]", "source 1 needs a text as path"),
        ("[{dataset: nih, path: 3}]", "source 1 needs a text as path"),
        ("[{dataset: nih, path: ''}]", "source 1 needs a text as path"),
        ("[{dataset: nih, path: A, name: 7}]", "source 1 needs a text as name"),
        (
            "[{dataset: nih, path: A, paht: B}]",
            "source 1 has the unknown key 'paht' (did you mean path?); the keys",
        ),
        ("[{dataset: nih, path: A, img_size: 64}]", "source 1 has the unknown key 'img_size'"),
        ("[{dataset: nih, path: A, 3: 4}]", "source 1 has the unknown key 3"),
        ("[{dataset: nih, path: A}, {dataset: nih, path: B}]", "two sources are called nih: give each a name"),
        ("{dataset: nih, path: A}", "DATA.SOURCES must be of type list"),
        ("[{dataset: nih, path: /nowhere/x}]", "DATA.SOURCES nih: the path /nowhere/x is not a folder"),
        (
            "[{dataset: nih, path: A}, {dataset: brax, path: ./A}]",
            "brax: the path ./A is that of nih, too",
        ),
        ("[{dataset: nhi, path: A}]", "DATA.SOURCES nhi: DATA.DATASET is 'nhi'; choose one of"),
        ("[{dataset: nih, path: A}]", "DATA.SOURCES nih: "),
        (
            "[{dataset: nih, path: A, split_seed: soon}]",
            "nih: DATA.SPLIT_SEED must be of type int, got 'soon'",
        ),
        ("[{dataset: vindr, path: A, readers: all}]", "DATA.READERS is 'all'; choose one of majority, any"),
        ("[{dataset: imagenet, path: P}]", "its task is single_label; only multilabel data can be mixed"),
    ],
)
def test_bad_sources_are_named_in_one_line(tiny, tmp_path, monkeypatch, entries, named):
    monkeypatch.chdir(tmp_path)
    for kind in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "P" / kind / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(tmp_path / "P" / kind / name / "0.png")
    (tmp_path / "A").mkdir()
    (tmp_path / "B").mkdir()
    with pytest.raises(UserError) as error:
        size = ["MODEL.NUM_CLASSES", "2"] if "imagenet" in entries else []
        build_datasets(get_config(Namespace(cfg=tiny, opts=["DATA.SOURCES", entries, *size])), "train", "validate")
    assert named in str(error.value) and "\n" not in str(error.value)


def test_sources_of_a_file_give_way_to_a_dataset_named_later(tmp_path, tiny):
    path = tmp_path / "both.yaml"
    sources = "[{dataset: nih, path: A}, {dataset: brax, path: B, name: sao_paulo}]"
    path.write_text(f"BASE: tiny.yaml\nDATA: {{SOURCES: {sources}}}\n")
    config = get_config(Namespace(cfg=path))
    assert (config.DATA.DATASET, len(config.DATA.SOURCES), config.RESULTS) == ("mimic_cxr", 2, "results/nih+sao_paulo")
    config = get_config(Namespace(cfg=path, dataset="vindr"))
    assert (config.DATA.DATASET, config.DATA.SOURCES, config.RESULTS) == ("vindr", [], "results/vindr")


@pytest.mark.parametrize("split", ["validate", "test"])
def test_a_patient_in_train_of_one_source_and_tested_in_another_is_an_error(load, layouts, tmp_path, split):
    """Of the same release, whatever the order; two releases may have the same ids."""
    root = layouts("mimic")
    frame = pd.read_csv(root / "mimic-cxr-2.0.0-split.csv.gz", dtype=str)
    paths = "files/p" + frame["subject_id"].str[:2] + "/p" + frame["subject_id"] + "/s" + frame["study_id"] + "/"
    frame = frame.assign(path=str(root) + "/" + paths + frame["dicom_id"] + ".jpg", Edema="1")
    moved = frame["subject_id"][frame["split"] == split].iloc[0]
    for name in "abc":
        folder = tmp_path / name
        folder.mkdir()
        rows = frame[frame["subject_id"] == moved].assign(split="train") if name == "c" else frame
        rows.to_csv(folder / "images.csv", index=False)
    sources = [{"dataset": "mimic_cxr", "path": str(tmp_path / name), "name": name} for name in "ac"]
    for order in (sources, sources[::-1]):
        with pytest.raises(
            UserError, match=rf"DATA.SOURCES c trains on 1 patient.s. that are in the {split} split of a"
        ):
            build_datasets(load(order, DATA__LABELS="[Edema]", MODEL__NUM_CLASSES=1), "train")
    sources[1]["path"] = str(tmp_path / "b")
    build_datasets(load(sources, DATA__LABELS="[Edema]", MODEL__NUM_CLASSES=1), "train")


# ------------------------------------------------------------------------------------------- batches
def batches(length=60, groups=(), epoch=0, start=0, rank=0, world=1):
    sampler = TrainSampler(length, batch_size=6, accumulation=1, rank=rank, world_size=world, seed=3, groups=groups)
    sampler.epoch, sampler.start_batch = epoch, start
    return [[index for _, index in batch] for batch in sampler]


def test_even_mixing_holds_as_many_of_each_source():
    groups = [np.arange(0, 48), np.arange(48, 57), np.arange(57, 60)]
    epochs = [batches(groups=groups, epoch=k) for k in range(6)]
    for epoch in epochs:
        assert len(epoch) == 10  # as long as without
        for batch in epoch:
            assert [sum(index % 60 in group for index in batch) for group in groups] == [2, 2, 2]
        drawn = sum(epoch, [])
        assert len(set(drawn)) == 60  # a repeat is another number, with random numbers of its own
        assert len({i for i in drawn if i < 48}) == 20
        for group in groups[1:]:  # each image of a small source as often as the others, up to once
            times = np.bincount([index % 60 for index in drawn], minlength=60)[group]
            assert times.max() - times.min() <= 1
    assert len({i for epoch in epochs for batch in epoch for i in batch if i < 48}) > 40  # another part in every epoch
    # What is counted for the weights of positives: an epoch's images, on average.
    sampler = TrainSampler(60, batch_size=6, accumulation=1, rank=0, world_size=1, seed=3, groups=groups)
    times = np.bincount([index % 60 for epoch in epochs for batch in epoch for index in batch], minlength=60)
    for group in groups:
        assert sampler.expected[group].sum() == pytest.approx(times[group].sum() / len(epochs))
    assert len(set(sampler.expected[groups[1]])) == 1
    assert epochs[0] != epochs[1] and batches(groups=groups) == epochs[0]
    assert batches(groups=groups, start=4) == epochs[0][4:]  # as a resume goes on
    ranks = [batches(groups=groups, rank=rank, world=2) for rank in range(2)]
    assert [index for pair in zip(*ranks) for batch in pair for index in batch] == sum(epochs[0], [])


def test_mixing_by_size_is_the_order_of_one_data_set():
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    assert sum(batches(), []) == torch.randperm(60, generator=generator).tolist()


def test_a_repeat_has_random_numbers_of_its_own(load, pair):
    (train,) = build_datasets(load(pair), "train")
    items, n = SeededDataset(train, 0), len(train)
    first, again, repeat = items[0, 2], items[0, 2], items[0, 2 + n]
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], repeat[0])
    assert repeat[2] == 2 and torch.equal(first[1], repeat[1])


# ------------------------------------------------------------------------------------------- runs
def options(pair):
    """Of a run on both, with options that act on one of them, and on none."""
    return {
        "DATA__SOURCES": json.dumps(pair),
        "DATA__SOURCES_MIX": "even",
        "TRAIN__EPOCHS": 2,
        "DATA__SPLIT_SEED": 3,
        "DATA__READERS": "any",
        "DATA__DATA_PATH": "x",
    }


@pytest.fixture(scope="module")
def whole(run, pair):
    """A run on MIMIC-CXR and NIH, without interruption: its folder."""
    return run(name="whole", **options(pair))


def test_a_run_on_two_sources_tells_them_apart(whole):
    for line in epochs(whole):
        assert list(line["by_source"]) == ["mimic_cxr", "nih"]
        assert line["by_source"]["nih"]["auc"]["Fracture"] is None
        assert line["by_source"]["nih"].keys() == {"loss", "mean_auc", "mean_average_precision", "auc"}
    assert set(checkpoint.read(whole / "last_ckpt.pth")["patients"]) == {"mimic_cxr", "nih"}
    log = (whole / "log_rank0.txt").read_text()
    assert "DATA.DATA_PATH 'x' has no effect: DATA.SOURCES names the folders" in log
    assert "DATA.READERS 'any' has no effect" in log
    assert "SPLIT_SEED 3 has no effect" not in log and "SOURCES_MIX 'even' has no effect" not in log


def test_a_run_on_two_sources_resumes(run, whole, pair, monkeypatch):
    """Stopped within the first epoch it ends bit-identical."""
    signalled(monkeypatch, torch.optim.AdamW, "step", 3, signal.SIGUSR1)
    run(name="cut", status=signal.SIGUSR1, **options(pair))
    cut = run(name="cut", **options(pair))
    assert epochs(cut) == epochs(whole)
    ours, theirs = (checkpoint.read(folder / "last_ckpt.pth")["model"] for folder in (cut, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_place_within_an_epoch_is_lost_where_the_mixture_changes(load, pair):
    (train,) = build_datasets(load(pair), "train")
    (turned,) = build_datasets(load(pair[::-1]), "train")
    form = {"batch_size": 4, "accumulation": 1, "rank": 0, "world_size": 1, "seed": 0}
    even = TrainSampler(len(train), groups=train.rows_of_sources, **form)
    assert len({fingerprint(train), fingerprint(train, even), fingerprint(turned)}) == 3


def test_an_evaluation_shows_each_source_and_the_whole(run, trained, layouts, pair):
    """Its figures by source are those of its table of predictions."""
    sources = [{"dataset": "chexpert", "path": str(layouts("chexpert"))}, pair[1]]
    folder = run("--eval", "--resume", trained, name="both", DATA__SOURCES=json.dumps(sources))
    results = run.results("both")
    metrics, predictions = json.loads((results / "metrics.json").read_text()), results / "predictions.csv"
    table = pd.read_csv(predictions)
    assert metrics["dataset"] == "chexpert+nih" and list(metrics["by_source"]) == ["chexpert", "nih"]
    assert {name: own["images"] for name, own in metrics["by_source"].items()} == dict(table["source"].value_counts())
    for name, own in metrics["by_source"].items():
        rows = table[table["source"] == name]
        for label, value in own["auc"].items():
            known = rows[rows[f"{label}_target"].notna()]
            if known[f"{label}_target"].nunique() == 2:
                wanted = roc_auc_score(known[f"{label}_target"], known[f"{label}_probability"])
                assert value == pytest.approx(wanted, abs=1e-6)
            else:
                assert value is None
    counted = metrics["cohort"]["splits"]["test"]["groups"]["source"]["nih"]
    assert counted["images"] == metrics["by_source"]["nih"]["images"]
    assert "nih: mean AUROC" in (folder / "log_rank0.txt").read_text()
    groups, reason = find_groups(read_predictions(predictions), ())["source"]  # a subgroup of the report
    assert list(groups) == list(table["source"]) and reason is None


def test_a_model_of_several_releases_is_not_tested_on_their_patients(run, whole, layouts, tmp_path):
    """Even where the release is tested alone: here its lists are exchanged."""
    root = tmp_path / "exchanged"
    shutil.copytree(layouts("nih"), root)
    lists = [root / name for name in ("test_list.txt", "train_val_list.txt")]
    texts = [path.read_text() for path in lists]
    for path, text in zip(lists, texts[::-1]):
        path.write_text(text)
    with pytest.raises(UserError, match="was trained or chosen on .* patients of this test split of nih"):
        run("--eval", "--resume", whole / "last_ckpt.pth", "--dataset", "nih", "--data-path", root, name="seen")
