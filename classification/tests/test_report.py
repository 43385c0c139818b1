"""The report: every number of it in report.json, what cannot be computed said, mistakes in one line."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

import report
from analysis import applied
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
    argv += ["--output", tmp_path / "out", "--resamples", "200"]
    subprocess.run([sys.executable, "-c", command, *map(str, argv)], cwd=ROOT, check=True)
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    figures = {f"figures/{n}.{s}" for n in ("auroc", "roc", "precision_recall", "calibration", "cooccurrence")
               for s in ("png", "svg")}  # fmt: skip
    texts = "report.html report.json per_label.csv tables.tex summary.md model_card.md checklist.md calibration.json"
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


def test_a_worse_model(predictions, tmp_path):
    worse = table(tmp_path / "worse.csv", noise=6.0)
    other = run(predictions, "--against", worse)["against"][str(worse)]
    assert other["primary"] == "mean AUROC" and other["mean"]["difference"] > 0 and other["mean"]["p"] < 0.05
    edema = other["labels"]["Edema"]
    assert edema["low"] < edema["difference"] < edema["high"] and edema["p_holm"] >= edema["p"]


@pytest.mark.parametrize("option", ["--against", "--seeds-of", "--ensemble"])
def test_one_evaluation_twice_is_refused(predictions, tmp_path, option):
    """By its path, and by its probabilities under another name and in another order."""
    (tmp_path / "copy").mkdir()
    copy, other = tmp_path / "copy" / "same.csv", table(tmp_path / "copy" / "other.csv", noise=1.5)
    pd.read_csv(predictions)[::-1].to_csv(copy, index=False)
    for given in ([predictions], [copy], [other, other]):
        with pytest.raises(UserError, match=rf"{option}: .* is the same evaluation as .* \(every probability is equal"):
            run(predictions, option, *given, "--output", tmp_path / "copy" / "out")


def test_thresholds_and_scalings_come_from_validation_alone(predictions, validate, tmp_path):
    r = run(predictions, "--validate", validate)
    held_out, rows = pd.read_csv(validate), pd.read_csv(predictions)
    t = r["thresholds"]["sensitivity"]["labels"]["Edema"]
    positive = held_out["Edema_probability"][held_out["Edema_target"] == 1].sort_values(ascending=False)
    assert t["threshold"] == pytest.approx(positive.iloc[int(np.ceil(0.9 * len(positive))) - 1])
    called = rows["Edema_probability"] >= t["threshold"]
    assert t["tp"] == (called & (rows["Edema_target"] == 1)).sum()
    assert t["tp"] + t["fp"] + t["fn"] + t["tn"] == 180
    edema = held_out["Edema_target"] == 1
    assert t["fitted_on"] == {
        "patients": held_out.subject_id.nunique(), "positive_patients": held_out.subject_id[edema].nunique(),
        "images": 150, "positives": edema.sum(),
        "sensitivity": pytest.approx((held_out["Edema_probability"][edema] >= t["threshold"]).mean()),
        "specificity": pytest.approx((held_out["Edema_probability"][~edema] < t["threshold"]).mean()),
    }  # fmt: skip
    missed = f"missed in the test split (sensitivity of at least 0.9): Edema ({t['sensitivity']['value']:.3f})"
    assert (missed in (tmp_path / "summary.md").read_text()) == t["missed"]
    assert t["fitted_on"]["sensitivity"] >= 0.9 and t["missed"] is bool(t["sensitivity"]["value"] < 0.9)
    assert r["thresholds"]["youden"]["labels"]["Edema"]["missed"] is None  # it has no target
    fitted = json.loads((tmp_path / "calibration.json").read_text())
    assert fitted["platt"]["Edema"]["slope"] > 0 and fitted["platt"]["Fracture"] is None and fitted["temperature"] > 0
    assert "one class only" in fitted["chosen"]["Fracture"]["why"]
    # What the report calls calibrated is what predict.py --calibrated applies.
    adjust, fitted_for = applied.read_calibration(tmp_path, LABELS)
    probabilities = rows[[f"{name}_probability" for name in LABELS]].to_numpy()
    brier = ((adjust(probabilities)[:, 0] - rows["Edema_target"]) ** 2).mean()
    assert r["calibration"]["calibrated"]["labels"]["Edema"]["brier"]["value"] == pytest.approx(brier)
    assert fitted_for == r["fitted_for"] == fitted["fitted_for"]
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
    report.main([str(predictions), "--ensemble", str(other), "--output", str(tmp_path / "both"), "--resamples", "200"])
    joint = pd.read_csv(tmp_path / "both" / "predictions.csv")
    mean = (a["Edema_probability"] + b["Edema_probability"]) / 2
    np.testing.assert_allclose(joint["Edema_probability"], mean, rtol=1e-6)
    metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert metrics["auc"]["Edema"] == pytest.approx(roc_auc_score(a["Edema_target"], mean), abs=1e-6)
    assert read_evaluation(tmp_path / "both").test.label_names == LABELS


def test_images_are_ranked_by_logits_where_probabilities_are_all_one(predictions, tmp_path):
    """Perfectly ranked logits from 39.9 to 43; read, by study, in an ensemble, and with the files of before."""
    names, images = ("Edema",), 40
    z = np.linspace(39.9, 43, images, dtype=np.float32)[:, None]
    targets = (np.arange(images) >= 15).astype(float)[:, None]
    ids = {"dicom_id": np.arange(images), "study_id": np.arange(images) // 2, "subject_id": np.arange(images) // 2}
    probabilities = 1 / (1 + np.exp(-z.astype(float)))
    for name, shift in (("a", 0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        write_predictions(tmp_path / name / "p.csv", ids, names, targets, probabilities, logits=z + np.float32(shift))
    r = run(tmp_path / "a" / "p.csv")
    edema = r["labels"]["Edema"]["auroc"]
    assert edema["value"] == 1 and edema["one_sided"] and edema["low"] == pytest.approx(0.05 ** (1 / 8))
    assert "separate the classes" in r["labels"]["Edema"]["remark"] and r["labels"]["Edema"]["auprc"]["low"] is None
    assert r["study"]["labels"]["Edema"]["auroc"]["value"] == 1
    assert read_evaluation(tmp_path / "a" / "p.csv").test.logits.astype(np.float32).tolist() == z.tolist()
    report.main([*(str(tmp_path / n / "p.csv") for n in "a"), "--ensemble", str(tmp_path / "b" / "p.csv"),
                 "--output", str(tmp_path / "both")])  # fmt: skip
    assert json.loads((tmp_path / "both" / "metrics.json").read_text())["auc"]["Edema"] == 1
    joint = read_evaluation(tmp_path / "both").test.logits
    np.testing.assert_allclose(joint, z - np.log((1 + np.exp(-0.5)) / 2), atol=1e-5)  # of the mean of 1 - probability
    rows = pd.read_csv(tmp_path / "a" / "p.csv")
    assert rows["Edema_probability"].nunique() == 1
    rows.drop(columns="Edema_logit").to_csv(tmp_path / "before.csv", index=False)
    assert run(tmp_path / "before.csv")["labels"]["Edema"]["auroc"]["value"] == 0.5
    rows.assign(Edema_logit=np.where(rows.index == 3, np.inf, 1)).to_csv(tmp_path / "odd.csv", index=False)
    with pytest.raises(UserError, match="Edema_logit is 'inf' in data row 4; expected a finite number"):
        run(tmp_path / "odd.csv")


def test_intervals_at_the_end_of_the_scale_have_a_width(tmp_path, validate):
    """A label whose scores separate the classes: no figure of it is certain."""
    path = table(tmp_path / "p.csv", patients=60)
    rows = pd.read_csv(path)
    rows["Edema_probability"] = 0.2 + 0.6 * rows["Edema_target"] + rows.index / 1000
    rows.to_csv(path, index=False)
    r = run(path, "--validate", validate)
    auroc, point = r["labels"]["Edema"]["auroc"], r["thresholds"]["youden"]["labels"]["Edema"]
    assert 0.5 < auroc["low"] < 0.99 and auroc["high"] == 1 == auroc["value"] and auroc["se"] is None
    assert "Edema add no uncertainty" in r["mean"]["remark"]
    summary = (tmp_path / "summary.md").read_text()
    assert f"1.000 (≥ {auroc['low']:.3f})" in summary and "one-sided bound from" in summary
    assert "What --calibrated applies" in summary and "PPV and NPV hold at the prevalence of this test split" in summary
    rates = [point[rate] for rate in ("sensitivity", "specificity", "ppv", "npv")]
    assert any(rate["value"] in (0, 1) for rate in rates)
    for rate in rates:
        assert rate["low"] is None or rate["high"] - rate["low"] > 0.01


def test_without_patients_and_with_one(predictions, tmp_path):
    rows = pd.read_csv(predictions)
    rows.drop(columns="subject_id").to_csv(tmp_path / "anonymous.csv", index=False)
    r = run(tmp_path / "anonymous.csv")
    assert r["bootstrap"]["unit"] == "image" and r["labels"]["Edema"]["positive_patients"] is None
    said = {name: (tmp_path / name).read_text().count("no subject") for name in ("summary.md", "report.html")}
    assert said == {"summary.md": 1, "report.html": 1}  # once a page, but in every table of a paper
    latex = (tmp_path / "tables.tex").read_text()
    assert latex.count("no subject") == latex.count("\\caption") - 4  # all but flow, prevalence, label-values, methods
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


def test_a_label_name_cannot_break_page_figures_or_latex(drawn, tmp_path):
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
    with pytest.raises(UserError, match=r"share patients \(30\), .* never fitted on the test split"):
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
    for few in ("0", "1", "199"):  # an interval of one resample has no width
        with pytest.raises(UserError, match=f"--resamples is {few}; 95% intervals need at least 200"):
            report.main([str(predictions), "--resamples", few])


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
        table(folder / "predictions.csv", noise=1 + k / 10)
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
    for erasing, folder in ((0.1, 0), (None, 1), (0.2, 0)):  # a run that is older than an option has its default
        aug = {} if erasing is None else {"AUG": {"REPROB": erasing}}
        config = {"SEED": folder, "TRAIN": {"BASE_LR": 1e-4}} | aug
        (folders[folder] / "metrics.json").write_text(json.dumps({"images": 180, "config": config}))
        if erasing is None:
            assert len(run(folders[0], "--seeds-of", folders[1])["seeds"]["runs"]) == 2
    with pytest.raises(UserError, match="AUG.REPROB differ"):
        run(folders[0], "--seeds-of", folders[1])
    other = table(tmp_path / "other.csv", noise=1.5)  # of which nobody knows the configuration
    for pair in ((folders[0], other), (other, folders[0])):
        with pytest.raises(UserError, match="--seeds-of: .*other.csv does not record its configuration"):
            run(pair[0], "--seeds-of", pair[1])
    for folder in folders:  # the same checkpoint evaluated on two machines: no second seed
        (folder / "metrics.json").write_text(
            json.dumps({"images": 180, "config": {"TRAIN": {"BASE_LR": 1e-4}}, "checkpoint_sha256": "a" * 64})
        )
    with pytest.raises(UserError, match="evaluation_1 is of the same checkpoint as .*evaluation_0"):
        run(folders[0], "--seeds-of", folders[1])


def test_groups_of_few_patients_are_warned_of_and_do_not_make_the_gap(tmp_path):
    predictions = table(tmp_path / "many.csv", patients=60, images=300)
    rows, patients = pd.read_csv(predictions), np.arange(60)
    sites = np.where(patients < 3, "small", np.where(patients % 2, "A", "B"))
    pd.DataFrame({"subject_id": 10_000_000.0 + patients, "site": sites}).to_csv(tmp_path / "site.csv", index=False)
    site = run(predictions, "--groups", tmp_path / "site.csv")["groups"]["site"]
    assert "too few patients" in site["groups"]["small"]["warning"]
    assert site["groups"]["small"]["patients"] == 3
    gap = site["gap"]["labels"]["Edema"]
    assert {gap["best"], gap["worst"]} == {"A", "B"} and gap["p"] <= gap["p_holm"] <= 1
    values = [site["groups"][g]["labels"]["Edema"]["auroc"]["value"] for g in "AB"]
    assert gap["value"] == pytest.approx(abs(values[0] - values[1]))
    assert (gap["low"] > 0) == (gap["p"] < 0.05) or gap["p"] == pytest.approx(0.05, abs=0.01)
    assert sum(g["images"] for g in site["groups"].values()) == len(rows)


def test_a_group_that_judges_few_labels_has_no_mean(tmp_path):
    """Of three labels it can judge one: that one is no mean, and does not make the others' mean one of one label."""
    rng, names = np.random.default_rng(0), ("Edema", "Lung Lesion", "Pneumonia")
    cluster = np.repeat(np.arange(90), 4)
    targets = (rng.random((360, 3)) < 0.4).astype(float)
    targets[cluster >= 60, 1:] = 0
    ids = {"dicom_id": np.arange(360), "subject_id": cluster, "site": np.array(["A", "B", "C"])[cluster // 30]}
    p = 1 / (1 + np.exp(-(targets + rng.normal(size=(360, 3)))))
    write_predictions(tmp_path / "p.csv", {k: v for k, v in ids.items() if k != "site"}, names, targets, p)
    pd.DataFrame({k: ids[k] for k in ("subject_id", "site")}).drop_duplicates().to_csv(tmp_path / "s.csv", index=False)
    site = run(tmp_path / "p.csv", "--groups", tmp_path / "s.csv")["groups"]["site"]
    assert site["mean_of"] == list(names)
    means = {g: found["mean"]["auroc"] for g, found in site["groups"].items()}
    assert means["C"]["value"] is None and means["C"]["left_out"] == "judges 1 of 3 labels"
    assert {site["gap"]["mean"]["best"], site["gap"]["mean"]["worst"]} == {"A", "B"} and means["A"]["value"] > 0.5


def test_ages_at_the_study_and_columns_of_one_name(predictions, tmp_path):
    """MIMIC-IV's anchor_age is the age in anchor_year; a study of ten years later is of a patient ten years older."""
    rows = pd.read_csv(predictions)
    patients = pd.DataFrame({"subject_id": rows.subject_id.unique()})
    patients = patients.assign(gender="F", anchor_age=35, anchor_year=2150, anchor_year_group="2008 - 2010", dod="")
    patients.to_csv(tmp_path / "patients.csv.gz", index=False)
    age = run(predictions, "--groups", tmp_path / "patients.csv.gz")["groups"]["age band"]
    assert list(age["groups"]) == ["18-39"] and "180 images by anchor_age" in age["remark"]
    late = rows.dicom_id.isin(rows.dicom_id[:70])
    metadata = rows[["dicom_id", "subject_id", "study_id"]].assign(
        PerformedProcedureStepDescription="CHEST", StudyDate=np.where(late, 21600101, 21500101), StudyTime=120000.0
    )
    metadata.iloc[:170].to_csv(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", index=False)
    found = run(
        predictions, "--groups", tmp_path / "patients.csv.gz", tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz"
    )["groups"]  # fmt: skip
    assert {g: part["images"] for g, part in found["age band"]["groups"].items()} == {"18-39": 110, "40-59": 70}
    assert "10 images by anchor_age" in found["age band"]["remark"] and set(found) == {"view", "sex", "age band"}
    odd = rows[["dicom_id"]].assign(view="mine", site="A", age=["-3", *["018M"] * 179], Sex="M")
    odd.to_csv(tmp_path / "one.csv", index=False)
    odd[["dicom_id"]].assign(site="B").to_csv(tmp_path / "two.csv", index=False)
    found = run(predictions, "--groups", tmp_path / "one.csv", tmp_path / "two.csv")["groups"]
    assert set(found["view"]["groups"]) == {"AP", "PA", "lateral"}
    assert set(found["view (one.csv)"]["groups"]) == {"mine"}
    assert "there is a view already, so the column view of" in found["view (one.csv)"]["remark"]
    assert set(found["site"]["groups"]) == {"A"} and set(found["site (two.csv)"]["groups"]) == {"B"}
    assert list(found["age band"]["groups"]) == ["0-17"] and found["age band"]["unknown"] == 1
    assert "1 images have no age that can be read, such as '-3'" in found["age band"]["remark"]
    (tmp_path / "twice.csv").write_text("dicom_id,site,site\nimage0,A,B\n")
    with pytest.raises(UserError, match="column 'site' is there more than once"):
        run(predictions, "--groups", tmp_path / "twice.csv")
    with pytest.raises(UserError, match=r"there is a site \(two.csv\) already; rename the column"):
        run(predictions, "--groups", tmp_path / "two.csv", tmp_path / "two.csv", tmp_path / "two.csv")
