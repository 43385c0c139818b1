"""CXR-LT: tables and splits of each task, where its images are, leakage to and from MIMIC-CXR, report, submission."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

import predict
import prepare_mimic
from analysis import tables as report_tables
from common.errors import UserError
from config import get_config, parse_args, source_configs
from conftest import SHARED
from dataset import cxr_lt
from dataset.build import build_datasets, own_values
from dataset.cxr_lt import TASKS, load_table
from dataset.patients import refuse_known, seen_by
from dataset.tables import SPLITS
from dataset.tools.listing import list_images

SAMPLE = SHARED / "cxr_lt_sample" / "cxr-lt-2024"
FILES = {
    "2023": ("cxr-lt-2023", "train.csv", "development.csv", "test.csv"),
    "2024-1": ("cxr-lt-2024", "train_labeled.csv", "development_labeled_task1.csv", "test_labeled_task1.csv"),
    "2024-2": ("cxr-lt-2024", "train_labeled.csv", "development_labeled_task2.csv", "test_labeled_task2.csv"),
}


@pytest.fixture
def own(layouts, tmp_path):
    """A copy of the synthetic tree that a test may damage."""
    shutil.copytree(layouts("cxr_lt"), tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_its_labels_and_splits(layouts, task):
    """Against the files as pandas reads them."""
    folder, *files = FILES[task]
    table = load_table(layouts("cxr_lt"), task=task)
    frames = [pd.read_csv(layouts("cxr_lt") / folder / name, keep_default_na=False) for name in files]
    whole = pd.concat([frame.assign(split=split) for split, frame in zip(SPLITS, frames)])
    assert len(table.label_names) == {"2023": 26, "2024-1": 40, "2024-2": 26}[task]
    if task != "2024-2":  # whose train table has the labels of both
        assert list(table.label_names) == list(frames[0].columns[6:])
    assert list(table.label_names) == list(frames[2].columns[6:])
    np.testing.assert_array_equal(table.labels, whole[list(table.label_names)].to_numpy(np.float32))
    assert [SPLITS[k] for k in table.split] == whole["split"].tolist()
    assert [name.decode() for name in table.dicom_id] == whole["dicom_id"].tolist()
    assert ["s" + name.decode() for name in table.study] == whole["study_id"].tolist()
    assert [name.decode() for name in table.subject] == whole["subject_id"].astype(str).tolist()
    views = whole["ViewPosition"].map({"PA": "PA", "AP": "AP", "LATERAL": "lateral", "": ""})
    assert table.view.tolist() == views.tolist() and "" in set(views)
    assert ("Normal" in table.label_names) == (task != "2023") and "Round(ed) Atelectasis" in TASKS["2024-1"]
    either = load_table(layouts("cxr_lt"), task=task, label_names=("No Finding", "Normal"))
    np.testing.assert_array_equal(either.labels[:, 0], either.labels[:, 1])  # one label, two names


def test_only_train_is_there(own):
    for name in ("development_labeled_task1.csv", "test_labeled_task1.csv"):
        (own / "cxr-lt-2024" / name).unlink()
    table = load_table(own, task="2024-1")
    people = [set(table.subject[table.split == k]) for k in range(3)]
    assert len(people[1]) == -(-len(people[0] | people[1]) // 10) and not people[0] & people[1] and not people[2]
    assert any("validation: a tenth of the patients of train" in note for note in table.notes)


def test_images_lie_beside_or_are_named(layouts, own, tmp_path):
    inside = load_table(own / "cxr-lt-2024", task="2024-1")  # the tables' own folder: files/ is beside it
    assert inside.root == own and (own / inside.path[0].decode()).is_file()
    tables_alone = tmp_path / "physionet" / "files" / "cxr-lt" / "2.0.0"
    for name in ("cxr-lt-2023", "cxr-lt-2024"):
        shutil.copytree(own / name, tables_alone / name)
    with pytest.raises(UserError, match="beside .*2.0.0/cxr-lt-2024 has no images .*name the folder of MIMIC-CXR-JPG"):
        load_table(tables_alone, task="2024-1")
    # The same pictures as in the tree of MIMIC-CXR, named by it or by its files/.
    for named in (layouts("mimic"), layouts("mimic") / "files"):
        assert load_table(tables_alone, task="2023", images=str(named)).root == layouts("mimic")
    release = tables_alone.parents[1] / "mimic-cxr-jpg" / "2.1.0"
    shutil.copytree(own / "files", release / "files")
    assert load_table(tables_alone, task="2024-2").root == release  # as a download of both lies
    with pytest.raises(UserError, match="DATA.IMAGES: .*cxr-lt-2023 has no images"):
        load_table(tables_alone, task="2023", images=str(own / "cxr-lt-2023"))
    shutil.copytree(own / "files", tables_alone / "copy" / "files")
    shutil.copytree(own / "files", tables_alone / "other" / "files")
    with pytest.raises(UserError, match="several folders have images .*copy, .*other.*; name the folder"):
        load_table(tables_alone, task="2023")


def test_the_small_copy(layouts, tmp_path):
    copy = tmp_path / "copy"
    for zipped in ((), ("--zip",)):
        command = [
            "build",
            "--dataset",
            "cxr_lt",
            "--data-path",
            str(layouts("cxr_lt") / "cxr-lt-2024"),
            "--workers",
            "1",
        ]
        assert prepare_mimic.main([*command, "--output", str(copy) + "z" * len(zipped), "--size", "64", *zipped]) == 0
    whole = load_table(layouts("cxr_lt"), task="2024-1")
    for table in (load_table(copy, task="2024-1"), load_table(f"{copy}z", task="2024-1", in_zip=True)):
        assert table.path.tolist() == whole.path.tolist() and not table.store.missing(table.path).any()
        np.testing.assert_array_equal(table.labels, whole.labels)
    # The copy of MIMIC-CXR itself serves as well.
    build = [
        "build",
        "--data-path",
        str(layouts("mimic")),
        "--output",
        str(tmp_path / "m"),
        "--size",
        "64",
        "--workers",
        "1",
    ]
    assert prepare_mimic.main(build) == 0
    table = load_table(layouts("cxr_lt"), task="2024-1", images=str(tmp_path / "m"))
    assert table.root == tmp_path / "m" and not table.store.missing(table.path).any()


def test_faults_of_the_tables(own):
    folder = own / "cxr-lt-2024"

    def refused(match, task="2024-1", root=folder):
        with pytest.raises(UserError, match=match):
            load_table(root, task=task)

    refused(
        "cxr-lt-2024 has no tables of CXR-LT 2023; it has those of 2024-1 and 2024-2: set DATA.CXR_LT 2024-1", "2023"
    )
    refused("cxr-lt-2023 has no tables of CXR-LT 2024-2; it has those of 2023: set", "2024-2", own / "cxr-lt-2023")
    path = folder / "development_labeled_task1.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.assign(Edema="-1").to_csv(path, index=False)
    refused("development_labeled_task1.csv: label 'Edema' is '-1' in data row 1; expected 1 or 0")
    frame.assign(Edema=["1", "", *frame["Edema"][2:]]).to_csv(path, index=False)
    refused("task1.csv: label 'Edema' is '' in data row 2; expected 1 or 0")
    frame.rename(columns={"Round(ed) Atelectasis": "Rounded Atelectasis"}).to_csv(path, index=False)
    refused(r"task1.csv: column 'Round\(ed\) Atelectasis' is missing")
    frame.assign(subject_id=pd.read_csv(folder / "train_labeled.csv")["subject_id"][0]).to_csv(path, index=False)
    refused("1 patient.* in more than one split")
    pd.concat([frame, frame.head(1)]).to_csv(path, index=False)
    refused("image .* has more than one row")
    with pytest.raises(UserError, match="is a table of CXR-LT, .* Read it by --dataset cxr_lt"):
        prepare_mimic.main(["labels", "--data-path", str(folder)])


def test_options_of_the_release(run_main, layouts, tiny, capsys):
    assert (
        prepare_mimic.main(["labels", "--dataset", "cxr_lt", "--data-path", str(layouts("cxr_lt") / "cxr-lt-2023")])
        == 0
    )
    assert capsys.readouterr().out.split("\n")[:-1] == list(TASKS["2023"])
    args = parse_args(["--cfg", str(tiny), "--dataset", "cxr_lt"])
    assert get_config(args, own_values).TRAIN.BEST_BY == "mean_average_precision"
    mixed = parse_args(["--cfg", str(tiny), "--opts", "DATA.SOURCES", "[{dataset: cxr_lt, path: a, cxr_lt: 2023}]"])
    config = get_config(mixed, own_values)
    assert config.TRAIN.BEST_BY == "mean_average_precision"
    assert source_configs(config)["cxr_lt"].DATA.CXR_LT == "2023"  # which YAML reads as a number
    with pytest.raises(
        UserError, match="MODEL.NUM_CLASSES is 14, but the data has 40 labels .*set MODEL.NUM_CLASSES 40"
    ):
        run_main(data=layouts("cxr_lt"), DATA__DATASET="cxr_lt")
    with pytest.raises(UserError, match="DATA.CXR_LT is '2022'; choose one of 2023, 2024-1, 2024-2"):
        run_main(data=layouts("cxr_lt"), DATA__DATASET="cxr_lt", DATA__CXR_LT="2022")


def train_and_test(data, folder, *options):
    """A tiny model trained on CXR-LT 2024-1, and its evaluation: (folder of the run, folder of the evaluation)."""
    import main
    from conftest import TINY

    (folder / "tiny.yaml").write_text(TINY)
    argv = ["--cfg", str(folder / "tiny.yaml"), "--dataset", "cxr_lt", "--data-path", str(data)]
    argv += ["--output", str(folder / "out"), "--opts", "MODEL.NUM_CLASSES", "40", "TRAIN.EPOCHS", "1"]
    argv += ["DATA.BATCH_SIZE", "4", "RESULTS", str(folder / "results"), "TEST.REPORT", "True", *options]
    for flags in ((), ("--eval",)):
        assert main.main([*argv, *flags]) == 0
    (result,) = (folder / "results").iterdir()
    return folder / "out" / "tiny" / "default", result


@pytest.fixture(scope="module")
def tested(layouts, tmp_path_factory):
    return train_and_test(layouts("cxr_lt"), tmp_path_factory.mktemp("cxr_lt"))


def test_the_report_groups_labels_and_heads_with_average_precision(tested, layouts):
    """Groups, average precision and F1 against pandas and scikit-learn."""
    run, result = tested
    report, predictions = json.loads((result / "report.json").read_text()), pd.read_csv(result / "predictions.csv")
    train = pd.read_csv(layouts("cxr_lt") / "cxr-lt-2024" / "train_labeled.csv")
    frequency, found = report["frequency"], {}
    for name in TASKS["2024-1"]:
        share, own = train[name].mean(), frequency["labels"][name]
        group = "head" if share >= 0.1 else "medium" if share >= 0.01 else "tail"
        assert own["share"] == pytest.approx(share) and own["group"] == group
        y, p = predictions[f"{name}_target"], predictions[f"{name}_probability"]
        if y.nunique() == 2:
            assert own["f1"]["half"] == pytest.approx(f1_score(y, p >= 0.5, zero_division=0))
            found[name] = average_precision_score(y, predictions[f"{name}_logit"])
    assert {len(group["labels"]) for group in frequency["groups"].values()} != {0}
    for group in frequency["groups"].values():
        expected = [found[name] for name in group["labels"] if name in found]
        assert (group["mean"]["auprc"]["value"] or 0) == pytest.approx(np.mean(expected) if expected else 0)
    mean = np.mean(list(found.values()))
    assert report["headline"].startswith(f"Mean average precision {mean:.3f} (")
    report["mean"]["auprc"] = {"value": 0.3, "low": 0.2, "high": 0.4}
    assert report_tables.headline(report).startswith("Mean average precision 0.300 (95% CI 0.200 to 0.400) over ")
    assert f"over {len(found)} labels" in report["headline"] and "mean F1 at 0.5 " in report["headline"]
    assert f"Mean average precision, test split</div><strong>{mean:.3f}" in (result / "report.html").read_text()
    assert "Labels by frequency" in (result / "model_card.md").read_text()
    points = {n: p for n, p in report["thresholds"]["f1"]["labels"].items() if "tp" in p and n in found}
    for name, point in points.items():
        p, y = predictions[f"{name}_probability"], predictions[f"{name}_target"]
        assert frequency["labels"][name]["f1"]["chosen"] == pytest.approx(f1_score(y, p >= point["threshold"]))
    assert points
    epochs = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert epochs["best_mean_average_precision"] == epochs["mean_average_precision"]
    assert "no patient of the test split was in training" in str(report["methods"])
    (table,) = [t for key, _, found, _ in report_tables.sections(report) if key == "frequency" for t in found]
    assert [row[1].text for row in table.rows[:40]] == sorted(
        (row[1].text for row in table.rows[:40]), key=["head", "medium", "tail"].index
    )


def test_no_model_is_tested_on_patients_of_the_other_release(tested, run_main, layouts, tmp_path):
    run, _ = tested
    options = {"DATA__BATCH_SIZE": 4, "TRAIN__EPOCHS": 1}
    same = "was trained or chosen on .* patients of this test split of mimic_cxr"
    with pytest.raises(UserError, match=same):
        labels = "[Atelectasis, Edema]"
        first = run_main(data=layouts("mimic"), DATA__LABELS=labels, MODEL__NUM_CLASSES=2, **options)
        run_main("--eval", "--resume", first / "last_ckpt.pth", data=layouts("cxr_lt"), DATA__DATASET="cxr_lt",
                 DATA__LABELS=labels, MODEL__NUM_CLASSES=2, **options)  # fmt: skip
    with pytest.raises(UserError, match=same):
        state = torch.load(run / "last_ckpt.pth", weights_only=True)
        config = get_config(parse_args(["--cfg", str(run_main.cfg), "--data-path", str(layouts("mimic"))]))
        refuse_known(seen_by(state)[0], build_datasets(config, "test")[0], config, run / "last_ckpt.pth")
    sources = [
        {"dataset": "mimic_cxr", "path": str(layouts("mimic"))},
        {"dataset": "cxr_lt", "path": str(layouts("cxr_lt"))},
    ]
    with pytest.raises(UserError, match="trains on .* that are in the .* split of .*, of the same release"):
        run_main(
            DATA__SOURCES=json.dumps(sources), DATA__LABELS="[Edema]", MODEL__NUM_CLASSES=1, out="mixed", **options
        )


def test_a_submission(tested, layouts, tmp_path):
    run, result = tested
    table = layouts("cxr_lt") / "cxr-lt-2024" / "test_labeled_task1.csv"
    command = [str(run / "best_ckpt.pth"), str(table), "--output", str(tmp_path / "s.csv"), "--format", "cxr-lt"]
    assert predict.main(command) == 0
    text, found = (tmp_path / "s.csv").read_bytes(), pd.read_csv(tmp_path / "s.csv")
    assert list(found.columns) == ["dicom_id", *TASKS["2024-1"]]
    expected = pd.read_csv(result / "predictions.csv").set_index("dicom_id").loc[found["dicom_id"]]
    np.testing.assert_allclose(
        found[list(TASKS["2024-1"])], expected[[f"{n}_probability" for n in TASKS["2024-1"]]], atol=1e-6
    )
    assert set(found["dicom_id"]) == set(pd.read_csv(table)["dicom_id"])
    # Resumed after a cut, and with nothing left to do.
    for kept in (len(text) // 2, len(text)):
        (tmp_path / "s.csv").write_bytes(text[:kept])
        assert predict.main(command) == 0 and (tmp_path / "s.csv").read_bytes() == text
    with pytest.raises(UserError, match="--format cxr-lt has dicom_id and probabilities alone; leave out --no-ids"):
        predict.main([*command, "--no-ids"])


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the real X-rays of ../shared are not there")
def test_the_sample_of_real_images():
    for task, count in (("2024-1", 40), ("2024-2", 26)):
        table = load_table(SAMPLE, task=task)
        assert table.root == SHARED / "cxr_sample" and len(table.label_names) == count
        assert np.bincount(table.split).tolist() == [660, 115, 100]
    assert cxr_lt.RELEASE.learned_labels(SAMPLE) == TASKS["2024-1"]


def test_a_model_of_studies(own, tmp_path):
    """Trained, tested, reported and submitted: each image has the answer of its study, which takes one of them."""
    folder, labels = own / "cxr-lt-2024", list(TASKS["2024-1"])
    table = folder / "test_labeled_task1.csv"
    truth = pd.read_csv(table)
    study = truth["study_id"].str[1:].astype(int)
    options = ["DATA.UNIT", "study", "MODEL.FUSION", "attention", "DATA.MAX_VIEWS", "1"]
    run, result = train_and_test(own, tmp_path, *options)
    rows = pd.read_csv(result / "predictions.csv").set_index("study_id")
    assert sorted(rows.index) == sorted(study.unique()) and len(rows) < len(truth)
    np.testing.assert_array_equal(rows.loc[study, [f"{n}_target" for n in labels]], truth[labels])
    report = json.loads((result / "report.json").read_text())
    found = [n for n in labels if rows[f"{n}_target"].nunique() == 2]
    scores = [average_precision_score(rows[f"{n}_target"], rows[f"{n}_logit"]) for n in found]
    assert report["headline"].startswith(f"Mean average precision {np.mean(scores):.3f} (")
    train = pd.read_csv(folder / "train_labeled.csv")  # whose images, not studies, make a label frequent
    assert all(report["frequency"]["labels"][n]["share"] == pytest.approx(train[n].mean()) for n in labels)
    assert list(torch.load(run / "best_ckpt.pth", weights_only=True)["patients"]) == ["mimic_cxr"]

    command = [str(run / "best_ckpt.pth"), str(table), "-j", "0", "-b", "2", "--format", "cxr-lt", "--output"]
    out = tmp_path / "s.csv"
    assert predict.main([*command, str(out)]) == 0
    text, found = out.read_bytes(), pd.read_csv(out)
    assert list(found) == ["dicom_id", *labels] and sorted(found["dicom_id"]) == sorted(truth["dicom_id"])
    expected = rows.loc[study.set_axis(truth["dicom_id"])[found["dicom_id"]], [f"{n}_probability" for n in labels]]
    np.testing.assert_allclose(found[labels], expected, atol=1e-6)
    out.write_bytes(text[: len(text) // 2])  # resumed after a cut
    assert predict.main([*command, str(out)]) == 0 and out.read_bytes() == text
    # Of an image that cannot be read the other one answers, for both.
    (own / truth["fpath"][study.duplicated(keep=False)].iloc[0]).write_bytes(b"")
    assert predict.main([*command, str(tmp_path / "t.csv")]) == 0
    assert pd.read_csv(tmp_path / "t.csv")[labels].notna().all(axis=None)


def test_tools_find_images_elsewhere(layouts, tmp_path, capsys):
    """Tables alone, and the folder of MIMIC-CXR's images: audited, copied, predicted; the copy serves every task."""
    folder, where = tmp_path / "far" / "from" / "images" / "cxr-lt-2024", str(layouts("mimic"))
    shutil.copytree(layouts("cxr_lt") / "cxr-lt-2024", folder)
    given = ["--dataset", "cxr_lt", "--data-path", str(folder), "--workers", "1"]
    assert prepare_mimic.main(["labels", *given]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == list(TASKS["2024-1"])
    for name in ("audit", "build"):
        command = [name, *given, "--output", str(tmp_path / name)]
        with pytest.raises(
            UserError, match="cxr-lt-2024 has no images .*name the folder of MIMIC-CXR-JPG.*or --images"
        ):
            prepare_mimic.main(command)
        with pytest.raises(
            UserError, match="/no is not a folder; give the release folder with DATA.IMAGES or --images"
        ):
            prepare_mimic.main([*command, "--images", str(tmp_path / "no")])
        assert prepare_mimic.main([*command, "--images", where]) == 0
    assert "nothing is wrong" in (tmp_path / "audit" / "audit.txt").read_text()
    with pytest.raises(
        UserError, match="--images is for --dataset cxr_lt; the images of nih are looked for in --data-p"
    ):
        prepare_mimic.main(["audit", "--dataset", "nih", "--data-path", str(folder), "--images", where])
    copy = tmp_path / "build"
    for task in ("2024-1", "2024-2"):
        whole = load_table(folder, task=task, images=where)
        for table in (load_table(copy, task=task), load_table(folder, task=task, images=str(copy))):
            assert table.root == copy and not table.store.missing(table.path).any()
            np.testing.assert_array_equal(table.labels, whole.labels)
    test = folder / "test_labeled_task1.csv"
    with pytest.raises(UserError, match="cxr-lt-2024 has no images .* or --images"):
        list_images([test])
    for path in copy.rglob("*.jpg"):
        path.rename(path.with_suffix(".dcm"))
    for images in (layouts("mimic"), copy):
        found = [one.file for one in list_images([test], images=images)]
        assert all(file.is_file() for file in found)
        stems = {file.relative_to(images).with_suffix(".jpg").as_posix() for file in found}
        assert stems == set(pd.read_csv(test)["fpath"])
    few = tmp_path / "few.csv"  # a table of the user's own, with the paths of the release
    pd.read_csv(test)[["fpath"]].rename(columns={"fpath": "path"}).to_csv(few, index=False)
    assert all(one.file.is_file() for one in list_images([few], images=copy))
    few.write_text("dicom_id\na\n")
    with pytest.raises(UserError, match="few.csv: column 'path' is missing"):
        list_images([few], images=copy)
