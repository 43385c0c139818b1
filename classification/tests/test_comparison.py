"""Several evaluations in one report: numbers against scikit-learn and loops, what is said, mistakes in one line."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import report
from analysis import comparison, comparison_tables, statistics
from analysis.evaluation import read_evaluation
from analysis.results import Options, collect
from common.errors import UserError
from test_report import table

LABELS = ("Edema", "Lung Lesion", "Fracture", "Pneumonia")  # the helper makes the last two negative throughout
RESAMPLES = 200
PLACES = {"mimic_cxr": {"seed": 0, "first": 0}, "nih": {"seed": 5, "first": 900_000, "images": 150, "patients": 40}}
NIH = {
    "Lung Lesion": {"from": ["Mass", "Nodule"], "kind": "approximate"},
    "Edema": {"from": ["Edema"], "kind": "exact"},
}


def evaluation(folder, dataset="mimic_cxr", *, model="a", noise=1.0, unknown=(), change=lambda rows: rows, **metrics):
    """An evaluation folder: predictions of the helper of test_report.py, and a metrics.json."""
    folder.mkdir()
    path = table(folder / "predictions.csv", names=LABELS, noise=noise, **PLACES[dataset])
    rows = pd.read_csv(path)
    rows["Pneumonia_target"] = rows["Edema_target"]
    rows[[f"{name}_target" for name in unknown]] = np.nan
    rows = change(rows)
    rows.to_csv(path, index=False)
    config = {"MODEL": {"NAME": f"net_{model}", "TYPE": "intern_image"}, "TAG": "run1", "DATA": {"DATASET": dataset}}
    written = {"images": len(rows), "dataset": dataset, "checkpoint_sha256": model * 64, "config": config}
    written["label_policy"] = {"uncertain": "zeros", "missing": "zeros"}
    (folder / "metrics.json").write_text(json.dumps(written | metrics))
    return folder


def run(tmp_path, *argv):
    """report.main on several -> (report.json, summary.md)."""
    out = tmp_path / "out"
    report.main([*map(str, argv), "--output", str(out), "--resamples", str(RESAMPLES)])
    return json.loads((out / "report.json").read_text()), (out / "summary.md").read_text()


def compare(*folders, names=None):
    """The same without the files."""
    found = comparison.collect([read_evaluation(f) for f in folders], Options(resamples=RESAMPLES), names)
    return found, comparison_tables.summary(found)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Models a and b on mimic_cxr and nih; nih does not know Pneumonia, and its rows come in another order for b."""
    nih, tmp_path = {"unknown": ["Pneumonia"], "label_mapping": NIH}, tmp_path_factory.mktemp("four")
    return [
        evaluation(tmp_path / "a_mimic", parameters=28_100_000, gmacs=4.61, images_per_s=812.0, device="A100"),
        evaluation(tmp_path / "a_nih", "nih", **nih),
        evaluation(tmp_path / "b_mimic", model="b", noise=2.0, change=lambda rows: rows[::-1]),
        evaluation(tmp_path / "b_nih", "nih", model="b", noise=1.5, change=lambda rows: rows.sample(frac=1), **nih),
    ]


def pairs_in_order(positive, negative):
    """AUROC by its definition: the share of pairs in the right order, a tie as half a one."""
    return np.mean((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative))


def mean_by_loops(folder, names):
    """(mean AUROC by scikit-learn, its resamples by the definition), patient by patient."""
    rows = pd.read_csv(folder / "predictions.csv").sort_values("dicom_id").reset_index(drop=True)
    patients = [part.index.to_numpy() for _, part in rows.groupby("subject_id")]
    y, p = (rows[[f"{n}_{what}" for n in names]].to_numpy() for what in ("target", "probability"))

    def resampled(column):
        chosen = np.concatenate([np.tile(rows, times) for rows, times in zip(patients, column)])
        by_label = zip(y[chosen].T, p[chosen].T)
        return np.mean([pairs_in_order(scores[truth == 1], scores[truth == 0]) for truth, scores in by_label])

    draws = [resampled(column) for column in statistics.draw(len(patients), RESAMPLES, 0).T]
    return np.mean([roc_auc_score(truth, scores) for truth, scores in zip(y.T, p.T)]), np.array(draws)


def test_a_model_on_two_test_sets_side_by_side(drawn, four, tmp_path):
    r, text = run(tmp_path, *four[:2])
    assert r["common_labels"] == ["Edema", "Lung Lesion"]  # Fracture has one class, Pneumonia is unknown to nih
    for folder, dataset in zip(four, ("mimic_cxr", "nih")):
        found = r["sets"][dataset]["models"]["net_a/run1"]
        value, draws = mean_by_loops(folder, r["common_labels"])
        low, high = np.percentile(draws, [2.5, 97.5])
        assert found["mean_common"]["auroc"]["value"] == pytest.approx(value, abs=1e-12)
        assert found["mean_common"]["auroc"]["low"] == pytest.approx(low, abs=1e-12)
        assert found["mean_common"]["auroc"]["high"] == pytest.approx(high, abs=1e-12)
        assert not r["sets"][dataset]["differences"]
    alone, _ = collect(read_evaluation(four[1]), Options(resamples=RESAMPLES))  # nih, in a report of its own
    assert found["labels"] == alone["labels"] and found["mean"] == alone["mean"]
    assert "| label | mimic_cxr | nih |" in text and "mean of the 2 common" in text
    line = next(line for line in text.splitlines() if line.startswith("| Lung Lesion"))
    assert line.endswith("† |") and line.count("†") == 1  # nih's column alone
    assert "† approximate label: nih: Lung Lesion from Mass or Nodule" in text
    assert next(line for line in text.splitlines() if line.startswith("| Pneumonia")).endswith("| – |")
    assert "not known: nih: Pneumonia" in text and "Fracture: one class only" in text
    assert "every evaluation: Edema, Lung Lesion†." in text
    assert "Models on" not in text
    latex = (tmp_path / "out" / "tables.tex").read_text()
    assert r"$^\dagger$" in latex and "†" not in latex
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{r['sets']['nih']['models']['net_a/run1']['mean_common']['auroc']['value']:.3f}" in page
    assert "https://" not in page and "http://" not in page.replace("http://www.w3.org", "")
    csv = pd.read_csv(tmp_path / "out" / "per_label.csv").set_index(["set", "label"])
    assert csv.loc[("nih", "Edema"), "auroc"] == pytest.approx(
        r["sets"]["nih"]["models"]["net_a/run1"]["labels"]["Edema"]["auroc"]["value"]
    )


def test_models_on_the_same_images_are_compared_in_pairs(four, tmp_path):
    r, text = run(tmp_path, four[0], four[2])
    part, names = r["sets"]["mimic_cxr"], ["Edema", "Lung Lesion", "Pneumonia"]
    (a, a_draws), (b, b_draws) = (mean_by_loops(folder, names) for folder in (four[0], four[2]))
    d = part["differences"]["net_b"]["mean"]
    assert part["first"] == "net_a" and d["difference"] == pytest.approx(b - a, abs=1e-12)
    low, high = np.percentile(b_draws - a_draws, [2.5, 97.5])
    assert (d["low"], d["high"]) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
    smaller = min((b_draws >= a_draws).sum(), (b_draws <= a_draws).sum())
    assert d["p"] == pytest.approx(2 * (1 + smaller) / (RESAMPLES + 1)) and d["p_holm"] == d["p"]
    first, second = (next(x for x in text.splitlines() if x.startswith(f"| net_{m} | intern")) for m in "ab")
    assert first.startswith("| net_a | intern_image | 28.1 | 4.61 | 812 |") and first.endswith("| – | – |")
    assert second.startswith("| net_b | intern_image | – | – | – |") and f"{b - a:+.3f}" in second
    assert "images/s: A100" in text and "on the same images" in text and "180 test images" in text
    assert "net_b compared with net_a" in text  # the differences by label


def test_models_by_test_sets_give_both_tables(four, tmp_path, capsys):
    r, text = run(tmp_path, *four, "--names", *["net_a/run1"] * 2, *["net_b/run1"] * 2)
    printed = capsys.readouterr().out
    assert list(r["models"]) == ["net_a/run1", "net_b/run1"] and list(r["sets"]) == ["mimic_cxr", "nih"]
    for title in ("Models by test set", "Models on mimic_cxr", "Models on nih", "AUROC of net_a/run1 by label"):
        assert f"### {title}" in text and title in printed
    assert "Mean AUROC over 3 labels: Edema, Lung Lesion, Pneumonia." in text  # of mimic_cxr, in its own table
    for dataset, folders in (("mimic_cxr", four[::2]), ("nih", four[1::2])):
        for model, folder in zip(r["models"], folders):
            value, _ = mean_by_loops(folder, ["Edema", "Lung Lesion"])
            found = r["sets"][dataset]["models"][model]["mean_common"]["auroc"]["value"]
            assert found == pytest.approx(value, abs=1e-12)


def test_three_models_are_adjusted_by_holm(four, tmp_path):
    third = evaluation(tmp_path / "c", model="c", noise=1.2)
    r, text = compare(four[0], four[2], third)
    p, holm = ([d["mean"][k] for d in r["sets"]["mimic_cxr"]["differences"].values()] for k in ("p", "p_holm"))
    assert min(holm) == pytest.approx(min(1, 2 * min(p))) and max(holm) == max(*p, min(holm)) and "p (Holm)" in text
    for d in r["sets"]["mimic_cxr"]["differences"].values():  # in the sentences at the head as well
        p, adjusted = (f"{d['mean'][key]:.3f}" for key in ("p", "p_holm"))
        assert any(f"p = {p}, by Holm = {adjusted}." in line for line in text.splitlines()[:8])


def test_runs_are_named_by_what_differs(tmp_path):
    seeds = []
    for k, seed in enumerate((1, 2)):
        seeds.append(evaluation(tmp_path / f"e{k}", model=f"s{k}", noise=1 + k))
        written = json.loads((seeds[-1] / "metrics.json").read_text())
        written["config"] |= {"SEED": seed, "MODEL": {"NAME": "net", "TYPE": "intern_image"}}
        (seeds[-1] / "metrics.json").write_text(json.dumps(written))
    assert list(compare(*seeds)[0]["models"]) == ["net/run1 (SEED 1)", "net/run1 (SEED 2)"]


def test_what_differs_between_columns_is_said(tmp_path):
    one = evaluation(
        tmp_path / "one", images_per_s=10.0, device="H100", domain={"trained": "pictures", "tested": "pictures"}
    )
    other = evaluation(
        tmp_path / "other", "nih", label_policy={"uncertain": "ones", "missing": "zeros"},
        domain={"trained": "pictures", "tested": "dicom window"}, warnings=["trained on pictures"],
        trained_on=["mimic_cxr"], change=lambda rows: rows.drop(columns="subject_id"),
    )  # fmt: skip
    slow = evaluation(tmp_path / "slow", model="b", noise=2.0, images_per_s=5.0, device="A100")
    _, text = compare(one, other, slow)
    assert (
        "label policy differs: mimic_cxr: uncertain (-1) counted as negative, blank counted as negative; nih:" in text
    )
    assert "image domain differs: mimic_cxr: pictures; nih: dicom window, trained on pictures" in text
    assert "Warning: nih: trained on pictures" in text
    assert "nih: external, the model was trained on mimic_cxr" in text
    assert "nih: no subject_id: images were drawn" in text
    assert (
        "Warning: images/s do not compare, they were not measured alike" in text and "net_a: H100; net_b: A100" in text
    )


def test_names_and_other_models_on_other_sets(four, tmp_path):
    r, text = compare(four[0], four[3])
    assert "| label | mimic_cxr | nih |" in text and "the models differ: mimic_cxr: net_a; nih: net_b" in text
    r, text = compare(four[0], four[3], names=["Boston", "Bethesda"])
    assert "| label | Boston | Bethesda |" in text and "test sets: Boston: mimic_cxr; Bethesda: nih" in text
    places = ["Boston", "Bethesda", "Boston", "Bethesda"]
    r, _ = run(tmp_path, *four, "--test-sets", *places)
    assert list(r["sets"]) == places[:2] and list(r["models"]) == ["net_a", "net_b"]
    for wrong, message in (
        (["x", "x", "x", "x"], "--test-sets calls different images x"),
        (["x", "y", "z", "y"], "--test-sets names the same images x and z"),
        (["x"], "--test-sets has 1 for 4 evaluations"),
    ):
        with pytest.raises(UserError, match=message):
            report.main([*map(str, four), "--test-sets", *wrong, "--resamples", "200"])
    r, text = compare(*four, names=["big", "big", "small", "small"])
    assert list(r["models"]) == ["big", "small"] and "AUROC of big by label" in text
    again = evaluation(tmp_path / "c_mimic", model="c", noise=1.2)
    written = json.loads((again / "metrics.json").read_text())
    written["config"]["MODEL"]["NAME"] = "net_a"  # another checkpoint of the same name
    (again / "metrics.json").write_text(json.dumps(written))
    assert list(compare(four[0], again)[0]["models"]) == ["net_a/run1 (a_mimic)", "net_a/run1 (c_mimic)"]


def test_tables_of_predictions_alone_and_a_model_with_other_labels(four, tmp_path):
    csv = [tmp_path / "deep.csv", tmp_path / "wide.csv"]
    for path, folder in zip(csv, (four[0], four[2])):
        pd.read_csv(folder / "predictions.csv").to_csv(path, index=False)
    rows = pd.read_csv(csv[1])
    rows[["Hernia_target", "Hernia_probability"]] = 0.0
    rows.drop(columns=["Fracture_target", "Fracture_probability", "Fracture_label"]).to_csv(csv[1], index=False)
    r, text = compare(*csv)
    assert r["sets"]["deep"]["label_names"] == ["Edema", "Lung Lesion", "Pneumonia"]
    assert "left out, since not every model has them: deep: Fracture; wide: Hernia" in text
    assert "policy for uncertain and blank labels: not recorded" in text
    text = compare(csv[0], four[1])[1]
    assert "label policy not known of all: deep: not recorded; nih: uncertain (-1) counted as negative" in text
    for path in csv:  # without ids the same targets, row for row, are the same images
        pd.read_csv(path).sort_values("dicom_id").drop(columns="dicom_id").to_csv(path, index=False)
    again, _ = compare(*csv)
    found = [x["sets"]["deep"]["differences"]["wide"]["mean"] for x in (r, again)]
    for key in ("difference", "low", "high", "p"):
        assert found[1][key] == pytest.approx(found[0][key], abs=1e-12)


def test_the_default_folder_is_new_and_faults_leave_none(four):
    report.main([str(four[0]), "--resamples", "200", str(four[2])])
    (made,) = four[0].parent.glob("comparison_*")
    assert {p.name for p in made.iterdir()} == {
        "report.html", "report.json", "summary.md", "tables.tex", "per_label.csv", "figures",
    }  # fmt: skip
    with pytest.raises(UserError):
        report.main([str(four[0]), str(four[0])])
    assert len(list(four[0].parent.glob("comparison_*"))) == 1


def test_mistakes_are_named(four, tmp_path):
    a, a_nih, b, _ = four
    (tmp_path / "empty").mkdir()
    copy = evaluation(tmp_path / "copy")
    twin = evaluation(tmp_path / "twin", noise=1.1)
    part = evaluation(tmp_path / "part", model="c", change=lambda rows: rows[20:])
    flipped = evaluation(tmp_path / "flipped", model="c", change=lambda r: r.assign(Edema_target=1 - r.Edema_target))
    alone = evaluation(tmp_path / "alone", "nih", unknown=LABELS[:3])
    renamed = evaluation(
        tmp_path / "renamed", model="c", change=lambda r: r.rename(columns=lambda c: c.replace("_", "s_", 1)
                                                                  if c.startswith(LABELS) else c))  # fmt: skip
    for argv, message in (
        ([a, b, a.parent / "a_nih" / ".." / "a_mimic"], "a_mimic is the same evaluation as .*a_mimic"),
        ([a, a / "predictions.csv"], "is the same evaluation as"),
        ([a, copy], "copy is the same evaluation as .*a_mimic .every probability is equal"),
        ([a, twin], "twin and .*a_mimic are both net_a/run1 on the same images; .*--names"),
        ([a, b, "--names", "x", "x"], "are both x on the same images"),
        ([a, part], r"share 160 of their 160 and 180 images: neither one test set nor two"),
        ([a_nih, b, part], r"share 160 of their 160 and 180"),
        ([a, flipped], "180 other targets than"),
        (
            [evaluation(tmp_path / "few", unknown=["Pneumonia"]), alone],
            r"no label that every evaluation knows.*few: Ed",
        ),
        ([a, renamed], r"no label that every evaluation knows.*renamed: Edemas, Lung Lesions"),
        ([a, tmp_path / "empty"], "empty is no evaluation"),
        ([a, tmp_path / "nowhere"], "does not exist"),
        ([a, b, "--against", a_nih], "--against is for one evaluation, and 2 are given; evaluations of the same"),
        ([a, b, "--ensemble", a_nih], "--ensemble is for one evaluation.*make the ensemble first"),
        ([a, b, "--seeds-of", a_nih], "--seeds-of is for one evaluation"),
        ([a, b, "--study-by", "max"], "--study-by is for one evaluation"),
        ([a, b, "--names", "x"], "--names has 1 for 2 evaluations"),
        ([a, b, "--names", "x", " "], "--names: the name of .*b_mimic is blank"),
        ([a, "--names", "x"], "--names is for several evaluations"),
        ([a, b, "--output", a], "--output .*a_mimic is one of the evaluations"),
    ):
        with pytest.raises(UserError, match=message) as found:
            report.main([*map(str, argv), "--resamples", "200"])
        assert "\n" not in str(found.value)
