"""DATA.UNIT study: what an item is; training, evaluation, prediction and report work with it as with images."""

import json
import logging
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import export
import main
import predict
import report
from common.distributed import World
from common.errors import UserError
from common.studies import Studies
from config import from_dict
from conftest import TINY, epochs, signalled
from dataset.build import build_datasets, build_loader
from dataset.labels import LABELS
from dataset.mixing import Mixing
from dataset.studies import StudyDataset, take_unreadable
from dataset.views import find_views
from test_training import assert_same_run
from training import checkpoint

LOG = logging.getLogger("test")
WORLD = World(0, 1, torch.device("cpu"))
UNIT = {"DATA__UNIT": "study", "DATA__BATCH_SIZE": 8, "MODEL__FUSION": "attention", "MODEL__HEAD_WIDTH": 32}


def config_of(tree, **data):
    import yaml

    content = yaml.safe_load(TINY)
    content["DATA"] |= {"DATA_PATH": str(tree), "UNIT": "study", **data}
    return from_dict(content, "test")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A tree whose studies have one to seven images."""
    from dataset.synthetic.tree import write_tree

    root = tmp_path_factory.mktemp("many")
    write_tree(root, patients=12, size=64, studies=(1, 3), images=(1, 7), progress=False)
    return root


def tables_of(tree, split):
    """The images of a split, from the tables by pandas alone."""
    frame = pd.read_csv(next(tree.glob("*-split.csv.gz")), dtype=str)
    metadata = pd.read_csv(next(tree.glob("*-metadata.csv.gz")), dtype=str, keep_default_na=False)
    frame["view"] = frame.dicom_id.map(dict(zip(metadata.dicom_id, find_views(metadata))))
    return frame[frame.split == split]


# ------------------------------------------------------------------------------------------ items
def test_an_item_is_a_study(many):
    (dataset,) = build_datasets(config_of(many), "test")
    frame = tables_of(many, "test")
    labels = pd.read_csv(next(many.glob("*-chexpert.csv.gz")), dtype={"study_id": str}).set_index("study_id")
    ids = dataset.ids()
    assert sorted(ids["study_id"]) == sorted(frame.study_id.unique()) and len(dataset) == frame.study_id.nunique()
    sizes = []
    for k, study in enumerate(ids["study_id"]):
        part = frame[frame.study_id == study]
        images, target = dataset[k]
        assert isinstance(images, Studies) and images.images.shape[1:] == (1, 32, 32)
        assert set(part.subject_id) == {ids["subject_id"][k]}
        np.testing.assert_array_equal(target, (labels.loc[study, list(LABELS)] == 1).to_numpy(np.float32))
        shown = ids["images"][k].split(";")
        assert set(shown) <= set(part.dicom_id) and len(images.images) == len(shown) == min(4, len(part))
        # One of each view is among them before a second one of any.
        views = part.set_index("dicom_id").view
        assert dataset.descriptions()["views"][k].split(";") == list(views[shown])
        assert [("", "AP", "PA", "lateral")[v] for v in images.view] == [
            v if v != "other" else "" for v in views[shown]
        ]
        counts, there = views[shown].value_counts(), views.value_counts()
        assert all(counts.get(v, 0) >= min(n, counts.max() - 1) for v, n in there.items())
        sizes.append(len(part))
    assert max(sizes) > 4 > min(sizes)
    assert f"{sum(s > 4 for s in sizes):,} have more than DATA.MAX_VIEWS 4" in dataset.summary


def test_more_images_than_max_views_are_sampled_anew_in_each_epoch(many):
    config = config_of(many, MAX_VIEWS=2)
    (dataset,) = build_datasets(config, "train")
    loader = build_loader(config, dataset, train=True, world=WORLD, log=LOG)
    big = int(np.argmax(np.diff(dataset.starts)))
    assert np.diff(dataset.starts)[big] >= 6

    def seen(epoch):
        item = loader.dataset[epoch, big]
        return item[0].images.numpy().tobytes(), len(item[0].images), item[0].rows.tolist()

    assert [seen(k) for k in range(4)] == [seen(k) for k in range(4)]
    assert len({seen(k)[0] for k in range(8)}) == 8 and {seen(k)[1] for k in range(8)} == {2}
    drawn = []
    dataset.of_images = type(
        "Images", (), {"__getitem__": lambda _, row: drawn.append(row) or (torch.zeros(1, 2, 2), 0)}
    )()
    for epoch in range(40):
        torch.manual_seed(epoch)
        dataset[big]
    assert set(drawn) == set(dataset.order[dataset.starts[big] : dataset.starts[big + 1]])  # each image has its turn


def test_of_data_without_studies_an_image_is_one(layouts):
    config = config_of(layouts("nih"), DATASET="nih")
    images = config.clone()
    images.defrost()
    images.DATA.UNIT = "image"
    (of_images,), (dataset,) = build_datasets(images, "test"), build_datasets(config, "test")
    assert len(dataset) == len(of_images) and dataset.ids()["images"] == of_images.ids()["dicom_id"]
    np.testing.assert_array_equal(dataset.targets, of_images.targets)


def test_several_sources(many, layouts):
    sources = [{"dataset": "mimic_cxr", "path": str(many)}, {"dataset": "nih", "path": str(layouts("nih"))}]
    config = config_of("", SOURCES=sources, SOURCES_MIX="even", BATCH_SIZE=4)
    (dataset,) = build_datasets(config, "train")
    here = dataset.sources == "mimic_cxr"
    assert here.sum() == tables_of(many, "train").study_id.nunique()
    assert all(text.startswith("mimic_cxr:") == is_here for text, is_here in zip(dataset.ids()["study_id"], here))
    assert np.isnan(dataset.targets[~here]).any() and not np.isnan(dataset.targets[here]).any()
    loader = build_loader(config, dataset, train=True, world=WORLD, log=LOG)
    _, targets, rows = next(iter(loader))
    assert (dataset.sources[rows] == "nih").sum() == 2
    np.testing.assert_array_equal(targets, dataset.targets[rows])


class Images:
    """Images of two studies of one patient whose rows differ in their labels, and one image without a study."""

    task, label_names, summary, warnings = "multilabel", ("a", "b"), "", []
    targets = np.array([[0, np.nan], [1, np.nan], [np.nan, 0.7], [0, 0], [1, 1]], np.float32)
    labels = np.array([[0, -1], [1, np.nan], [np.nan, -1], [0, -2], [1, 1]], np.float32)

    def __len__(self):
        return 5

    def ids(self):
        return {"dicom_id": list("vwxyz"), "study_id": ["1", "2", "1", "2", ""], "subject_id": ["p"] * 5}


def test_a_label_is_positive_if_it_is_for_any_image():
    dataset = StudyDataset(Images(), most=4, train=False, skip=False)
    assert dataset.ids() == {"study_id": ["1", "2", "z"], "subject_id": ["p"] * 3, "images": ["v;x", "w;y", "z"]}
    np.testing.assert_array_equal(dataset.targets, np.array([[0, 0.7], [1, 0], [1, 1]], np.float32))
    np.testing.assert_array_equal(dataset.labels, np.array([[0, -1], [1, np.nan], [1, 1]], np.float32))


def test_a_study_without_a_readable_image_is_an_error_and_others_answer(own_tree, caplog):
    (dataset,) = build_datasets(config_of(own_tree), "test")
    frame = tables_of(own_tree, "test")
    several = [k for k, text in enumerate(dataset.ids()["images"]) if ";" in text]
    partly, wholly = several[:2]

    def break_images(index, count):
        for name in dataset.ids()["images"][index].split(";")[:count]:
            next(own_tree.rglob(f"{name}.jpg")).write_bytes(b"")

    break_images(partly, 1)
    break_images(wholly, 9)
    with pytest.raises(UserError, match="cannot be read as an image"):
        dataset[partly]
    skipping = config_of(own_tree, ON_BAD_IMAGE="skip", BATCH_SIZE=4)
    (dataset,) = build_datasets(skipping, "test")
    study, before = dataset.ids()["study_id"][wholly], dataset.ids()["images"][partly]
    with pytest.raises(UserError, match=rf"study {study}: none of its \d images can be read, such as .*\.jpg: "):
        dataset[wholly]
    assert len(dataset[partly][0].images) == before.count(";")
    take_unreadable()
    with caplog.at_level(logging.WARNING):
        batches = list(build_loader(skipping, dataset, train=False, world=WORLD, log=LOG))
    rows = torch.cat([rows for _, _, rows in batches]).tolist()
    assert sorted(rows) == [k for k in range(len(dataset)) if k != wholly]
    assert caplog.text.count("skipped (DATA.ON_BAD_IMAGE)") == 2
    # A batch of nothing but such studies: black images, of which nothing is known.
    for name in frame.dicom_id:
        next(own_tree.rglob(f"{name}.jpg")).write_bytes(b"")
    train = build_loader(skipping, dataset, train=True, world=WORLD, log=LOG)
    images, targets, rows = next(iter(train))
    assert len(images) == 4 and targets.isnan().all() and (rows == -1).all()


def test_missing_images_are_left_out_of_their_study(own_tree):
    frame = tables_of(own_tree, "test")
    counts = frame.study_id.value_counts()
    study = counts[counts > 1].index[0]
    gone = frame[frame.study_id == study].dicom_id.iloc[0]
    next(own_tree.rglob(f"{gone}.jpg")).unlink()
    (dataset,) = build_datasets(config_of(own_tree, ALLOW_MISSING=True), "test")
    shown = dataset.ids()["images"][dataset.ids()["study_id"].index(study)]
    assert gone not in shown and shown.count(";") == min(counts[study] - 1, 4) - 1


def test_one_draw_mixes_all_images_of_a_study():
    """Mixup by its formula, the partner's images in their order, from the first again."""
    images = torch.rand(6, 3, 4, 4)
    batch = Studies(images, torch.arange(6) % 4, torch.tensor([[0, 1, 2], [3, -1, -1], [4, 5, -1]]))
    targets = torch.eye(3)

    def mix(images, targets):
        return 0.7 * images + 0.3 * images.roll(1, 0), 0.7 * targets + 0.3 * targets.roll(1, 0)

    mixed, soft = Mixing([mix], None, 1.0, 0, "batch", 3)(batch, targets)
    partners = [4, 5, 4, 0, 3, 3]  # of study 0 study 2, of 1 study 0, of 2 study 1
    torch.testing.assert_close(mixed.images, 0.7 * images + 0.3 * images[partners])
    torch.testing.assert_close(soft, 0.7 * targets + 0.3 * targets.roll(1, 0))
    assert torch.equal(mixed.rows, batch.rows) and torch.equal(mixed.view, batch.view)


# --------------------------------------------------------------------------- training, evaluation
@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """Two epochs of a study model, and its evaluation with a report."""
    base = tmp_path_factory.mktemp("finished")
    (base / "tiny.yaml").write_text(TINY)
    argv = ["--cfg", str(base / "tiny.yaml"), "--data-path", str(tree), "--output", str(base / "out")]
    opts = ["--opts", *(str(x) for k, v in UNIT.items() for x in (k.replace("__", "."), v))]
    opts += ["RESULTS", str(base / "results"), "AUG.MIXUP", "0.4"]
    assert main.main([*argv, *opts]) == 0
    assert main.main([*argv, "--eval", *opts, "TEST.REPORT", "True"]) == 0
    return base


def evaluation_of(base):
    return next((base / "results").glob("evaluation_*"))


def test_predictions_have_a_row_a_study(finished, tree):
    folder, frame = evaluation_of(finished), tables_of(tree, "test")
    rows = pd.read_csv(folder / "predictions.csv", dtype={"study_id": str, "subject_id": str})
    assert list(rows)[:5] == ["study_id", "subject_id", "images", "views", "path"]
    expected = frame.groupby("study_id").dicom_id.agg(set)
    assert len(rows) == len(expected)
    for row in rows.itertuples():
        shown = set(row.images.split(";"))
        assert shown <= expected[row.study_id] and len(shown) == min(4, len(expected[row.study_id]))
    metrics = json.loads((folder / "metrics.json").read_text())
    aucs = [
        roc_auc_score(rows[f"{n}_target"], rows[f"{n}_probability"])
        for n in LABELS
        if rows[f"{n}_target"].nunique() == 2
    ]
    assert metrics["images"] == len(rows) and metrics["mean_auc"] == pytest.approx(np.mean(aucs), abs=1e-6)
    log = (finished / "out" / "tiny" / "default" / "log_rank0.txt").read_text()
    assert f"on {len(rows)} test studies" in log and "updates of 8 studies per epoch" in log and " studies/s, " in log


def test_the_report_calls_its_unit_by_its_name(finished):
    folder = evaluation_of(finished)
    count = len(pd.read_csv(folder / "predictions.csv"))
    summary, page = (folder / "summary.md").read_text(), (folder / "report.html").read_text()
    for text in (f"on {count} test studies of", "Test split, by study"):
        assert text in summary and text in page
    assert "test images" not in summary and "Test split, by image" not in summary
    content = json.loads((folder / "report.json").read_text())
    assert content["bootstrap"]["row"] == "study" and content["bootstrap"]["unit"] == "patient"


def test_two_evaluations_of_studies_are_compared_study_by_study(finished, tmp_path, capsys):
    """The other model has fewer images of a study, as DATA.VIEWS frontal would, and its rows in another order."""
    folder, other = evaluation_of(finished), tmp_path / "other.csv"
    frame = pd.read_csv(folder / "predictions.csv", dtype=str).iloc[::-1]
    frame["images"], frame["views"] = (frame[c].str.split(";").str[0] for c in ("images", "views"))
    probability = [c for c in frame if c.endswith("_probability")]
    frame[probability] = frame[probability].astype(float).sample(frac=1, random_state=0).to_numpy()
    frame.drop(columns=[c for c in frame if c.endswith("_logit")]).to_csv(other, index=False)
    argv = [str(folder / "predictions.csv"), "--against", str(other), "--output", str(tmp_path), "--resamples", "200"]
    report.main(argv)
    found = json.loads((tmp_path / "report.json").read_text())["against"][str(other)]
    truth, p = (pd.read_csv(path).sort_values("study_id") for path in (folder / "predictions.csv", other))
    label = next(n for n in LABELS if truth[f"{n}_target"].nunique() == 2)
    ours, theirs = (roc_auc_score(t[f"{label}_target"], t[f"{label}_probability"]) for t in (truth, p))
    assert found["labels"][label]["difference"] == pytest.approx(ours - theirs, abs=1e-6)
    by_image = frame.drop(columns="images").rename(columns={"study_id": "dicom_id"})
    by_image.to_csv(other, index=False)
    with pytest.raises(UserError, match="has a row per image, .* per study; evaluate both by the same DATA.UNIT"):
        report.main(argv)


def test_a_resume_within_an_epoch_equals_the_uninterrupted_run(finished, run_main, monkeypatch):
    steps = signalled(monkeypatch, torch.optim.AdamW, "step", 7, signal.SIGUSR1)
    folder = run_main(AUG__MIXUP=0.4, **UNIT)
    assert run_main.status == signal.SIGUSR1 and len(steps) == 7
    run_main(AUG__MIXUP=0.4, **UNIT)
    assert_same_run(folder, finished / "out" / "tiny" / "default")


def test_workers_zip_and_memory_change_nothing(finished, run_main, tree, tmp_path):
    import os
    import zipfile

    copy = tmp_path / "zipped"
    copy.mkdir()
    with zipfile.ZipFile(copy / "a.zip", "w") as archive:
        for path in sorted(tree.glob("files/**/*.jpg")):
            archive.write(path, path.relative_to(tree))
    for path in tree.glob("*.csv.gz"):
        os.link(path, copy / path.name)
    folder = run_main("--zip", data=copy, AUG__MIXUP=0.4, DATA__NUM_WORKERS=1, DATA__IMG_ON_MEMORY=True, **UNIT)
    assert epochs(folder) == epochs(finished / "out" / "tiny" / "default")


def test_two_ranks_share_the_studies(tree):
    """Each rank has its half of a batch of one rank."""
    config = config_of(tree, BATCH_SIZE=4)
    (dataset,) = build_datasets(config, "train")
    whole = config.clone()
    whole.defrost()
    whole.DATA.BATCH_SIZE = 8
    one = next(iter(build_loader(whole, dataset, train=True, world=WORLD, log=LOG)))
    halves = [
        next(iter(build_loader(config, dataset, train=True, world=World(r, 2, torch.device("cpu")), log=LOG)))
        for r in (0, 1)
    ]
    assert torch.equal(torch.cat([rows for _, _, rows in halves]), one[2])
    assert torch.equal(torch.cat([batch.images for batch, _, _ in halves]), one[0].images)


def test_a_checkpoint_of_the_other_unit(finished, run_main):
    best = finished / "out" / "tiny" / "default" / "best_ckpt.pth"
    for mode in ([], ["--eval"]):
        with pytest.raises(
            UserError, match="best_ckpt.pth was trained with DATA.UNIT study, here it is image; set DATA.U"
        ):
            run_main(*mode, "--resume", best, out="other")
    with pytest.raises(
        UserError, match="best_ckpt.pth answers by attention; set MODEL.HEAD, MODEL.FUSION and DATA.UNIT"
    ):
        run_main("--eval", "--pretrained", best, out="other")


def test_frontal_images_alone(tree):
    (dataset,) = build_datasets(config_of(tree, VIEWS="frontal"), "test")
    assert set(";".join(dataset.descriptions()["views"]).split(";")) <= {"AP", "PA"}


# ----------------------------------------------------------------------------------------- predict
def test_predictions_by_study_are_those_of_the_evaluation(finished, tree, tmp_path, capsys):
    best = finished / "out" / "tiny" / "default" / "best_ckpt.pth"
    truth = pd.read_csv(evaluation_of(finished) / "predictions.csv", dtype={"study_id": str}).set_index("study_id")
    metadata = pd.read_csv(next(tree.glob("*-metadata.csv.gz")), dtype=str, keep_default_na=False)
    frame = tables_of(tree, "test").merge(metadata[["dicom_id", "ViewPosition"]], on="dicom_id")
    stem = "files/p" + frame.subject_id.str[:2] + "/p" + frame.subject_id + "/s" + frame.study_id + "/"
    table = tmp_path / "images.csv"
    frame.assign(path=[str(tree / s) for s in stem + frame.dicom_id + ".jpg"])[["path", "view"]].to_csv(
        table, index=False
    )
    argv = [str(best), str(table), "-j", "0", "--output", str(tmp_path / "p.csv")]
    assert predict.main(argv) == 0
    rows = pd.read_csv(tmp_path / "p.csv", dtype={"study_id": str}).set_index("study_id")
    assert f"{len(frame)} images of {len(truth)} studies, by subject_id and study_id" in (
        said := capsys.readouterr().out
    )
    assert f"{len(truth)} studies, 0 of them could not be read" in said
    probabilities = [f"{n}_probability" for n in LABELS]
    np.testing.assert_allclose(rows.loc[truth.index, list(LABELS)], truth[probabilities], atol=1e-6)
    assert rows.loc[truth.index].dicom_id.tolist() == truth.images.tolist()
    # By image: each is a study of one.
    assert predict.main([*argv[:-1], str(tmp_path / "i.csv"), "--by", "image"]) == 0
    alone = pd.read_csv(tmp_path / "i.csv", dtype={"study_id": str})
    assert len(alone) == len(frame)
    single = alone.groupby("study_id").filter(lambda part: len(part) == 1).set_index("study_id")
    np.testing.assert_allclose(single[list(LABELS)], rows.loc[single.index, list(LABELS)], atol=1e-6)


def test_unreadable_images_of_a_study_are_named_and_the_others_answer(finished, own_tree, tmp_path, capsys):
    one, two = [p for p in sorted(own_tree.glob("files/p1*/p*/s*")) if len(list(p.iterdir())) == 2][:2]
    bad, *others = sorted(one.iterdir())
    for path in (bad, *two.iterdir()):
        path.write_bytes(b"")
    argv = [str(finished / "out/tiny/default/best_ckpt.pth"), str(one), str(two), "-j", "0"]
    with pytest.raises(SystemExit):
        predict.main([*argv, "--output", str(tmp_path / "p.csv")])
    rows, said = pd.read_csv(tmp_path / "p.csv"), capsys.readouterr().out
    assert rows.dicom_id.tolist()[0] == others[0].stem and rows.error.isna().tolist() == [True, False]
    assert rows[list(LABELS)].notna().all(axis=1).tolist() == [True, False]
    assert "left out of its study, whose other images answer" in said and str(bad) in said
    assert "4 images of 2 studies" in said and "2 studies, 1 of them could not be read" in said


def test_an_image_model_answers_for_a_study_by_the_mean_of_its_logits(trained_once, tree, tmp_path):
    best = str(trained_once / "best_ckpt.pth")
    paths = [str(path) for path in sorted(tree.glob("files/p1*/p*/s*"))[:6]]
    tables = []
    for by in ("image", "study"):
        out = tmp_path / f"{by}.csv"
        assert predict.main([best, *paths, "-j", "0", "--by", by, "--output", str(out)]) == 0
        tables.append(pd.read_csv(out, dtype={"study_id": str}))
    images, studies = tables
    logits = np.log(images[list(LABELS)] / (1 - images[list(LABELS)])).groupby(images.study_id).mean()
    expected = 1 / (1 + np.exp(-logits.loc[studies.study_id]))
    assert len(studies) == 6 < len(images)
    np.testing.assert_allclose(studies[list(LABELS)], expected, atol=1e-6)


def test_the_mean_of_an_image_model_needs_no_training(one_epoch, run_main, tmp_path):
    """Evaluated as a study model, it has the mean of its images' logits."""
    weights = ("--pretrained", one_epoch / "best_ckpt.pth")
    run_main("--eval", RESULTS=tmp_path / "images")
    run_main("--eval", *weights, out="other", DATA__UNIT="study", RESULTS=tmp_path / "studies")
    images, studies = (pd.read_csv(next((tmp_path / n).glob("*/predictions.csv"))) for n in ("images", "studies"))
    logits, targets = ([f"{name}_{kind}" for name in LABELS] for kind in ("logit", "target"))
    expected = images.groupby("study_id")[logits].mean().loc[studies.study_id]
    assert images.study_id.value_counts().max() > 1
    np.testing.assert_allclose(studies[logits], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(studies[targets], images.groupby("study_id")[targets].max().loc[studies.study_id])


def test_a_model_of_studies_is_no_graph_of_single_images(finished, tmp_path):
    best = str(finished / "out/tiny/default/best_ckpt.pth")
    with pytest.raises(UserError, match="is a model of studies .*; a file of --format torch takes images one by one"):
        export.main([best, "--output", str(tmp_path / "m.pt2"), "--format", "torch"])
    assert export.main([best, "--output", str(tmp_path / "m.pth"), "--format", "weights"]) == 0


def test_overlays_of_a_study(finished, tree, tmp_path):
    folder = next(p for p in sorted(tree.glob("files/p1*/p*/s*")) if len(list(p.iterdir())) == 2)
    argv = [
        str(finished / "out/tiny/default/best_ckpt.pth"),
        str(folder),
        "-j",
        "0",
        "--output",
        str(tmp_path / "p.csv"),
    ]
    assert predict.main([*argv, "--explain", str(tmp_path / "x"), "--labels", "Edema"]) == 0
    names = sorted(path.stem for path in folder.iterdir())
    drawn = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert drawn == [f"000001_{name}_Edema.png" for name in names]


def test_a_frozen_backbone_from_an_image_model(trained_once, run_main):
    opts = {**UNIT, "TRAIN__FREEZE": "[backbone]", "TRAIN__EPOCHS": 1}
    folder = run_main("--pretrained", trained_once / "best_ckpt.pth", **opts)
    before, after = (
        checkpoint.read(f / name)["model"] for f, name in ((trained_once, "best_ckpt.pth"), (folder, "last_ckpt.pth"))
    )
    assert all(torch.equal(v, after[f"backbone.{k}"]) for k, v in before.items())
    assert "keys loaded, all but these" in (text := (folder / "log_rank0.txt").read_text())
    assert "missing: study_attention.project.weight" in text
