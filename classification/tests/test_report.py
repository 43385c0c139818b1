"""The report: every number of it in report.json, what cannot be computed said, mistakes in one line."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

import report
from analysis.evaluation import read_evaluation, write_predictions
from common.errors import UserError
from conftest import ROOT

LABELS = ("Edema", "Lung Lesion", "Fracture")


def table(path, *, patients=30, images=180, seed=0, first=0, names=LABELS, noise=1.0):
    """A CSV of predictions; Fracture is negative throughout. Scores of one seed differ by `noise` only."""
    rng = np.random.default_rng(seed)
    cluster = np.concatenate([np.arange(patients), rng.integers(0, patients, images - patients)])
    targets = (rng.normal(size=patients)[cluster][:, None] + rng.normal(size=(images, len(names))) > 0.5).astype(float)
    targets[:, 2:] = 0
    scores = 1 / (1 + np.exp(-(1.2 * targets - 0.5 + noise * rng.normal(size=targets.shape))))
    labels = np.where((targets == 0) & (rng.random(targets.shape) < 0.3), np.nan, targets)
    labels[(targets == 0) & (rng.random(targets.shape) < 0.1)] = -1
    ids = {
        "dicom_id": [f"image{first + k}" for k in range(images)],
        "study_id": 50_000_000 + first + np.arange(images) // 2 * 2 + 1000 * cluster,
        "subject_id": 10_000_000 + first + cluster,
        "view": rng.choice(["AP", "PA", "lateral"], images),
    }
    write_predictions(path, ids, names, targets, scores, labels)
    return path


@pytest.fixture
def predictions(tmp_path):
    return table(tmp_path / "predictions.csv")


@pytest.fixture
def validate(tmp_path):
    return table(tmp_path / "val.csv", seed=1, first=500_000, images=150)


def run(*argv):
    """report.main with few resamples -> report.json."""
    argv = [str(a) for a in argv]
    report.main([*argv, "--resamples", "200"])
    return json.loads((read_evaluation(argv[0]).folder / "report.json").read_text())


def test_everything_is_written_without_torch(predictions, validate, tmp_path):
    pd.DataFrame(
        {"subject_id": 10_000_000 + np.arange(30), "gender": ["M", "F"] * 15, "anchor_age": range(20, 80, 2)}
    ).to_csv(tmp_path / "patients.csv.gz", index=False)
    other = table(tmp_path / "other.csv", noise=3.0)
    command = """
import sys
import report
report.main(sys.argv[1:])
assert not {"torch", "torchvision", "timm"} & set(sys.modules)
"""
    argv = [predictions, "--validate", validate, "--groups", tmp_path / "patients.csv.gz", "--against", other]
    argv += ["--output", tmp_path / "out", "--resamples", "100"]
    subprocess.run([sys.executable, "-c", command, *map(str, argv)], cwd=ROOT, check=True)
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    figures = {f"figures/{n}.{s}" for n in ("auroc", "roc", "precision_recall", "calibration", "cooccurrence")
               for s in ("png", "svg")}  # fmt: skip
    texts = "report.html report.json per_label.csv tables.tex summary.md model_card.md calibration.json"
    assert found == figures | set(texts.split())
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page and "<script src" not in page
    )
    r = json.loads((tmp_path / "out" / "report.json").read_text())
    for text in (page, (tmp_path / "out" / "summary.md").read_text(), (tmp_path / "out" / "tables.tex").read_text()):
        for name in LABELS[:2]:
            assert f"{r['labels'][name]['auroc']['value']:.3f}" in text
            assert f"{r['against'][str(other)]['labels'][name]['difference']:+.3f}" in text
    assert set(r["groups"]) == {"view", "sex", "age band"}
    assert "not recorded" in page  # the label policy, beside every table
    csv = pd.read_csv(tmp_path / "out" / "per_label.csv", index_col="label")
    assert csv.loc["Edema", "auroc"] == pytest.approx(r["labels"]["Edema"]["auroc"]["value"])


def test_numbers_by_label_equal_scikit_learn(predictions):
    r, rows = run(predictions), pd.read_csv(predictions)
    values = []
    for name in LABELS[:2]:
        y, p = rows[f"{name}_target"], rows[f"{name}_probability"]
        found = r["labels"][name]
        values.append(roc_auc_score(y, p))
        assert found["auroc"]["value"] == pytest.approx(values[-1], abs=1e-12)
        assert found["auprc"]["value"] == pytest.approx(average_precision_score(y, p), abs=1e-12)
        assert found["auroc"]["low"] < values[-1] < found["auroc"]["high"] and found["auroc"]["se"] > 0
        assert found["auroc"]["undefined_resamples"] == 0
        assert (found["images"], found["positives"]) == (180, y.sum())
        assert found["positive_patients"] == rows.subject_id[y == 1].nunique()
    assert r["mean"]["auroc"]["value"] == pytest.approx(np.mean(values))
    fracture = r["labels"]["Fracture"]
    assert fracture["auroc"]["value"] is None and fracture["left_out"] == "one class only"
    study = rows.groupby("study_id").agg({"Edema_target": "max", "Edema_probability": "mean"})
    truth = roc_auc_score(study["Edema_target"], study["Edema_probability"])
    assert r["study"]["labels"]["Edema"]["auroc"]["value"] == pytest.approx(truth, abs=1e-12)
    assert r["study"]["studies"] == len(study)
    for view, group in r["groups"]["view"]["groups"].items():
        part = rows[rows.view == view]
        truth = roc_auc_score(part["Edema_target"], part["Edema_probability"])
        assert group["labels"]["Edema"]["auroc"]["value"] == pytest.approx(truth, abs=1e-12)
        assert (group["images"], group["patients"]) == (len(part), part.subject_id.nunique())
    ignored = next(p for p in r["sensitivity"]["policies"] if (p["uncertain"], p["missing"]) == ("ones", "ignore"))
    raw = rows["Edema_label"].dropna().abs()
    truth = roc_auc_score(raw, rows["Edema_probability"][raw.index])
    assert ignored["labels"]["Edema"]["auroc"]["value"] == pytest.approx(truth, abs=1e-12)
    assert [p["as_used"] for p in r["sensitivity"]["policies"]].count(True) == 1


def test_frontal_maximum_by_study(predictions):
    r, rows = run(predictions, "--study-by", "max", "--study-views", "frontal"), pd.read_csv(predictions)
    study = rows[rows.view != "lateral"].groupby("study_id").max(numeric_only=True)
    truth = roc_auc_score(study["Edema_target"], study["Edema_probability"])
    assert r["study"]["labels"]["Edema"]["auroc"]["value"] == pytest.approx(truth, abs=1e-12)


def test_the_same_model_against_itself_and_a_worse_one(predictions, tmp_path):
    worse = table(tmp_path / "worse.csv", noise=6.0)
    r = run(predictions, "--against", predictions, worse)
    same, other = r["against"][str(predictions)], r["against"][str(worse)]
    assert same["mean"]["difference"] == 0 and same["mean"]["p"] == 1 and same["labels"]["Edema"]["p"] == 1
    assert other["primary"] == "mean AUROC" and other["mean"]["difference"] > 0 and other["mean"]["p"] < 0.05
    edema = other["labels"]["Edema"]
    assert edema["low"] < edema["difference"] < edema["high"] and edema["p_holm"] >= edema["p"]


def test_thresholds_and_scalings_come_from_validation_alone(predictions, validate, tmp_path):
    r = run(predictions, "--validate", validate)
    held_out, rows = pd.read_csv(validate), pd.read_csv(predictions)
    t = r["thresholds"]["sensitivity"]["labels"]["Edema"]
    positive = held_out["Edema_probability"][held_out["Edema_target"] == 1].sort_values(ascending=False)
    assert t["threshold"] == pytest.approx(positive.iloc[int(np.ceil(0.9 * len(positive))) - 1])
    called = rows["Edema_probability"] >= t["threshold"]
    assert t["tp"] == (called & (rows["Edema_target"] == 1)).sum()
    assert t["tp"] + t["fp"] + t["fn"] + t["tn"] == 180
    fitted = json.loads((tmp_path / "calibration.json").read_text())
    assert fitted["platt"]["Edema"]["slope"] > 0 and fitted["platt"]["Fracture"] is None and fitted["temperature"] > 0
    r = run(predictions)
    assert "validation" in r["thresholds"]["left_out"] and "validation" in r["calibration"]["left_out"]
    assert not (tmp_path / "calibration.json").exists()


def test_validation_predictions_of_another_checkpoint_are_refused(predictions, validate, tmp_path):
    """Those without a metrics.json beside them cannot be checked: calibration.json then names no checkpoint."""
    folders = []
    for digest in ("a", "b"):
        folders.append(tmp_path / digest)
        folders[-1].mkdir()
        (folders[-1] / "predictions.csv").write_bytes(predictions.read_bytes())
        (folders[-1] / "predictions_validate.csv").write_bytes(validate.read_bytes())
        (folders[-1] / "metrics.json").write_text(json.dumps({"images": 180, "checkpoint_sha256": digest * 64}))
    with pytest.raises(UserError, match=r"--validate .*b/pred.* is of another checkpoint \(sha256 bbbbbbbbbbbb"):
        run(folders[0], "--validate", folders[1] / "predictions_validate.csv")
    for given, expected in ((folders[0] / "predictions_validate.csv", ["a" * 64]), (validate, None)):
        fitted_for = run(folders[0], "--validate", given)["fitted_for"]
        assert fitted_for["checkpoints_sha256"] == expected
        assert json.loads((folders[0] / "calibration.json").read_text())["fitted_for"] == fitted_for


def test_seeds_and_ensemble(predictions, tmp_path):
    other = table(tmp_path / "other.csv", noise=1.5)
    r = run(predictions, "--seeds-of", other)
    a, b = (pd.read_csv(p) for p in (predictions, other))
    values = [roc_auc_score(x["Edema_target"], x["Edema_probability"]) for x in (a, b)]
    assert r["seeds"]["labels"]["Edema"] == {
        "mean": pytest.approx(np.mean(values)),
        "sd": pytest.approx(np.std(values, ddof=1)),
    }
    report.main([str(predictions), "--ensemble", str(other), "--output", str(tmp_path / "both"), "--resamples", "50"])
    joint = pd.read_csv(tmp_path / "both" / "predictions.csv")
    mean = (a["Edema_probability"] + b["Edema_probability"]) / 2
    np.testing.assert_allclose(joint["Edema_probability"], mean, rtol=1e-6)
    metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert metrics["auc"]["Edema"] == pytest.approx(roc_auc_score(a["Edema_target"], mean), abs=1e-6)
    assert read_evaluation(tmp_path / "both").test.label_names == LABELS


def test_without_patients_and_with_one(predictions, tmp_path):
    rows = pd.read_csv(predictions)
    rows.drop(columns="subject_id").to_csv(tmp_path / "anonymous.csv", index=False)
    r = run(tmp_path / "anonymous.csv")
    assert r["bootstrap"]["unit"] == "image" and r["labels"]["Edema"]["positive_patients"] is None
    said = {name: (tmp_path / name).read_text().count("no subject") for name in ("summary.md", "report.html")}
    assert said == {"summary.md": 1, "report.html": 1}  # once a page, but in every table of a paper
    latex = (tmp_path / "tables.tex").read_text()
    assert latex.count("no subject") == latex.count("\\caption") - 2  # all but flow, prevalence
    rows.assign(subject_id=7).to_csv(tmp_path / "one.csv", index=False)
    r = run(tmp_path / "one.csv")
    auroc = r["labels"]["Edema"]["auroc"]
    assert auroc["value"] > 0.5 and (auroc["low"], auroc["se"]) == (None, None)
    assert (
        "one patient only" in r["bootstrap"]["warning"] and "one patient only" in (tmp_path / "summary.md").read_text()
    )


def test_every_label_of_one_class(predictions):
    rows = pd.read_csv(predictions)
    rows[[f"{n}_target" for n in LABELS]] = 0
    rows.to_csv(predictions, index=False)
    r = run(predictions)
    assert r["mean"]["auroc"]["value"] is None and "no AUROC" in r["headline"]


def test_a_label_name_cannot_break_page_or_latex(tmp_path):
    run(table(tmp_path / "p.csv", names=("<b>&_", 'x"%', "Fracture")))
    assert "<b>&_" not in (tmp_path / "report.html").read_text()
    assert r"\textless{}b\textgreater{}\&\_" in (tmp_path / "tables.tex").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda f: f.assign(Edema_probability=f.Edema_probability + 1),
            r"Edema_probability is '1\..*data row 1; expected",
        ),
        (lambda f: f.assign(Edema_probability=np.nan), "Edema_probability is '' in data row 1"),
        (lambda f: f.assign(Edema_probability="high"), "Edema_probability is 'high' in data row 1; not a number"),
        (lambda f: f.assign(Edema_target=0.5), "Edema_target is '0.5' .*expected 1, 0"),
        (lambda f: pd.concat([f, f[:3]]), r"image0 has more than one row \(3 rows too many\)"),
        (lambda f: f.drop(columns="Edema_target"), "'Edema' has no column Edema_target"),
        (lambda f: f.drop(columns="Edema_probability"), "'Edema' has no column Edema_probability"),
        (lambda f: f[["subject_id", "view"]], "holds no predictions: expected the columns"),
        (lambda f: f[:0], "no rows"),
        (lambda f: f.assign(subject_id=f.subject_id.where(f.index > 4)), "subject_id is empty in 5 of 180 rows"),
    ],
)
def test_faulty_predictions_are_named(predictions, change, message):
    change(pd.read_csv(predictions)).to_csv(predictions, index=False)
    with pytest.raises(UserError, match=message):
        run(predictions)


def test_faulty_companions_are_named(predictions, validate, tmp_path):
    rows = pd.read_csv(predictions)
    for change, message in (
        (lambda f: f[5:], "other images than .*5 missing, 0 more"),
        (lambda f: f.assign(Edema_target=1 - f.Edema_target), "180 other targets"),
        (lambda f: f.rename(columns=lambda c: c.replace("Edema", "Oedema")), r"1 missing \(Edema\), 1 more \(Oedema\)"),
        (lambda f: f.assign(subject_id=f.subject_id[::-1].to_numpy()), "another patient than"),
    ):
        change(rows).to_csv(tmp_path / "other.csv", index=False)
        with pytest.raises(UserError, match=message):
            run(predictions, "--against", tmp_path / "other.csv")
    with pytest.raises(UserError, match="30 patients of .* never fitted on the test split"):
        run(predictions, "--validate", predictions)
    with pytest.raises(UserError, match="never fitted on the test split"):
        run(predictions, "--validate", table(tmp_path / "again.csv", seed=9, patients=20))
    groups = tmp_path / "groups.csv"
    for content, message in (
        ("subject_id,site\n5,A\n", "none of the 30 values of subject_id"),
        ("patient,site\n5,A\n", "no column to join"),
        ("subject_id\n10000000\n", "no column besides subject_id"),
        ("subject_id,site\n10000000,A\n10000000,B\n", "10000000 has several rows that differ"),
    ):
        groups.write_text(content)
        with pytest.raises(UserError, match=message):
            run(predictions, "--groups", groups)
    with pytest.raises(UserError, match="is no evaluation: it has no predictions.csv"):
        report.main([str(tmp_path / "empty")]) if (tmp_path / "empty").mkdir() is None else None
    with pytest.raises(UserError, match="does not exist"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="--resamples is 0"):
        report.main([str(predictions), "--resamples", "0"])


def test_a_folder_whose_files_do_not_belong_together(predictions, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"images": 200, "auc": dict.fromkeys(LABELS)}))
    with pytest.raises(UserError, match="180 rows, but metrics.json beside it counts 200 images"):
        report.main([str(tmp_path)])
    (tmp_path / "metrics.json").write_text(json.dumps({"images": 180, "auc": {"Edema": None}}))
    with pytest.raises(UserError, match=r"2 more \(Lung Lesion, Fracture\)"):
        report.main([str(tmp_path)])
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        report.main([str(tmp_path)])
    for found in ({"config": None}, {"config": {"DATA": []}}, {"auc": None}, {"images": "180"}, {"gmacs": "4.9"}):
        (tmp_path / "metrics.json").write_text(json.dumps(found))
        key = next(iter(found))
        with pytest.raises(UserError, match=f"metrics.json is not as main.py --eval wrote it: (DATA|{key}) is"):
            report.main([str(tmp_path)])


def test_seeds_of_another_configuration_are_refused(predictions, tmp_path):
    folders = []
    for k, rate in enumerate((1e-4, 1e-3)):
        folder = tmp_path / f"evaluation_{k}"
        folder.mkdir()
        (folder / "predictions.csv").write_bytes(predictions.read_bytes())
        config = {"SEED": k, "TRAIN": {"BASE_LR": rate}}
        (folder / "metrics.json").write_text(json.dumps({"images": 180, "config": config}))
        folders.append(folder)
    with pytest.raises(UserError, match="TRAIN.BASE_LR differ"):
        run(folders[0], "--seeds-of", folders[1])
    for mix, folder in (("nih", 0), ("nih", 1), ("brax", 1)):  # how the data lay is no matter, what they were is
        source = {"dataset": mix, "path": str(folders[folder]), "zip_mode": folder == 1}
        config = {"SEED": folder, "DATA": {"SOURCES": [source]}}
        (folders[folder] / "metrics.json").write_text(json.dumps({"images": 180, "config": config}))
        if mix == "nih" and folder:
            assert len(run(folders[0], "--seeds-of", folders[1])["seeds"]["runs"]) == 2
    with pytest.raises(UserError, match="DATA.SOURCES differ"):
        run(folders[0], "--seeds-of", folders[1])


def test_groups_of_few_patients_are_warned_of_and_do_not_make_the_gap(predictions, tmp_path):
    rows = pd.read_csv(predictions)
    sites = np.where(np.arange(30) < 3, "small", np.where(np.arange(30) % 2, "A", "B"))
    pd.DataFrame({"subject_id": 10_000_000.0 + np.arange(30), "site": sites}).to_csv(tmp_path / "site.csv", index=False)
    site = run(predictions, "--groups", tmp_path / "site.csv")["groups"]["site"]
    assert "too few patients" in site["groups"]["small"]["warning"]
    assert site["groups"]["small"]["patients"] == 3
    gap = site["gap"]["labels"]["Edema"]
    assert {gap.get("best"), gap.get("worst")} in ({"A", "B"}, {None})
    assert sum(g["images"] for g in site["groups"].values()) == len(rows)
