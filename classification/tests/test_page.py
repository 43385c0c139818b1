"""report.html: its order, what it says once, names for screen readers; and axe, where a browser has it."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import report
from analysis.calibration import net_benefit
from analysis.templates import ENVIRONMENT, md, tex
from common.errors import UserError
from test_report import table

NAMES = ("Edema", "Lung Lesion", "50% <b>_x_</b>")


class Page(HTMLParser):
    """Every element of a page as (tag, attributes, text inside)."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in ("meta", "br", "img"):
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, **wanted):
        return [e for e in self.elements if e[0] == tag and all(e[1].get(k) == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report with everything: validation, groups with awkward names, a comparison, pictures of the errors."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("page") / "my evaluation"
    folder.mkdir()
    rows = pd.read_csv(table(folder / "predictions.csv", names=NAMES))
    rows["path"] = "files/" + rows["dicom_id"] + ".jpg"
    rows.to_csv(folder / "predictions.csv", index=False)
    table(folder / "predictions_validate.csv", names=NAMES, seed=1, first=500_000, images=150)
    (folder / "files").mkdir()
    for path in rows["path"]:
        Image.new("L", (8, 8), 90).save(folder / path)
    config = {"MODEL": {"NAME": "net"}, "DATA": {"DATASET": "mimic_cxr", "DATA_PATH": str(folder)}, "SEED": 3}
    epochs = [{"epoch": k, "train_loss": 1 / k, "val_loss": 1 / k, "mean_auc": 0.6 + k / 10, "lr": 0.1} for k in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, epochs)))
    written = {"images": len(rows), "dataset": "mimic_cxr", "root": str(folder), "config": config}
    written["checkpoint"] = str(folder / "run" / "best_ckpt.pth")
    (folder / "metrics.json").write_text(json.dumps(written))
    sites = [["100% & more_", "a b\nc"][k % 2] for k in range(30)]
    pd.DataFrame({"subject_id": range(10_000_000, 10_000_030), "site %": sites}).to_csv(
        folder / "site.csv", index=False
    )
    table(folder / "other.csv", names=NAMES, noise=3.0)
    argv = [folder, "--groups", folder / "site.csv", "--against", folder / "other.csv", "--resamples", 200]
    report.main([*map(str, argv)])
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text())


def test_cohort_first_and_what_is_folded(page):
    sections = [e[1]["id"] for e in page.all("section")]
    assert sections[:3] == ["s-cohort", "s-labels", "s-curves"] and sections[-1] == "s-errors"
    assert page.all("h1")[0][2] == "net on mimic_cxr" and page.all("title")[0][2] == "net on mimic_cxr"
    folded = {e[1]["id"] for e in page.all("details")}
    assert {"threshold-f1", "calibration-temperature", "policies"} <= folded and "threshold-youden" not in folded
    text = " ".join(e[2] for e in page.all("body"))
    assert text.count("bootstrap over 30 patients") == 1 and "called negative" not in text


def test_everything_has_a_name_and_every_link_a_target(page):
    ids = [e[1]["id"] for e in page.elements if "id" in e[1]]
    assert len(ids) == len(set(ids))
    assert {e[1]["href"][1:] for e in page.all("a")} <= set(ids)
    pictures = page.all("img")
    assert len(pictures) == len({e[1]["alt"] for e in pictures}) > 6 and all(e[1]["alt"] for e in pictures)
    copies = [e[1]["aria-label"] for e in page.all("button") if e[1].get("class") == "copy"]
    assert len(copies) == len(set(copies)) == len(page.all("table")) - 1
    assert all(e[2].strip() for e in page.all("button")) and all(e[2].strip() for e in page.all("th"))
    regions = [e[1]["aria-label"] for e in page.all("div", role="region")]
    assert len(regions) == len(set(regions)) == len(page.all("table"))
    assert all(e[1]["aria-label"] for e in page.all("svg", role="img"))


def test_an_interval_beyond_the_bar_has_an_arrow():
    interval_bar = ENVIRONMENT.get_template("table.html.j2").module.interval_bar
    assert "cut" not in interval_bar(0.7, 0.5, 1.0)
    assert interval_bar(0.55, 0.4, 0.7).count("cut") == 1 and interval_bar(0.45, 0.4, 0.48).count("value") == 0


def test_names_with_signs_of_latex_and_markdown(folder):
    latex = (folder / "tables.tex").read_text()
    assert r"100\% \& more\_ (" in latex and r"50\% \textless{}b\textgreater{}\_x\_" in latex
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in re.findall(r"\\label\{tab:([^}]*)\}", latex))
    assert not re.search(r"(?<!\\)%(?! Made by)", latex) and "a b c (" in latex  # a line break is a blank
    assert r"| 50% \<b\>\_x\_\</b\> |" in (folder / "summary.md").read_text()
    assert md("mean_auc a*b") == r"mean_auc a\*b" and tex("≥ 0.9") == r"$\geq$ 0.9"


def texts(folder):
    """{name: content} of the texts of a report."""
    return {p.name: p.read_text() for p in folder.iterdir() if p.suffix in (".html", ".json", ".csv", ".tex", ".md")}


SECRET = re.compile(r"image\d|(?<![\d.])100000\d\d(?!\d)|(?<![\d.])500\d{5}(?!\d)")  # dicom_id, subject_id, study_id


def test_a_report_to_pass_on(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    argv = ["my evaluation", "--share", "--against", "my evaluation/other.csv", "--resamples", "200"]
    report.main([*argv, "--groups", str(folder / "site.csv")])
    shared = texts(folder / "share")
    assert {"report.html", "report.json", "summary.md", "model_card.md", "tables.tex", "per_label.csv"} <= set(shared)
    for name, text in shared.items():
        assert not SECRET.search(text), (name, SECRET.search(text))
        assert str(folder.parent) not in text and "my evaluation/" not in text, name
        assert "data:image/jpeg" not in text
    own = texts(folder)  # the same search finds them in the report that stays, so it can find them
    assert (
        SECRET.search(own["report.html"])
        and SECRET.search(own["report.json"])
        and "data:image/jpeg" in own["report.html"]
    )
    assert str(folder) in own["report.json"] and str(folder) not in own["model_card.md"]
    there, here = (json.loads(found["report.json"]) for found in (shared, own))
    assert there["labels"] == here["labels"] and list(there["against"]) == ["other.csv"]
    holds = Page(own["report.html"]).all("p", **{"class": "why"})[0][2]
    shown = {e["row"] for kinds in here["errors"].values() for errors in kinds.values() for e in errors}
    assert f"holds {len(shown)} images of the data set and the ids of {len(shown)} images" in holds
    report.main([str(folder), "--no-images", "--output", str(folder.parent / "plain"), "--resamples", "200"])
    for name in ("report.html", "report.json"):
        assert not SECRET.search((folder.parent / "plain" / name).read_text())


def test_methods_statements_and_checklist(folder, tmp_path):
    about = tmp_path / "about.yaml"
    about.write_text("dates: 2011-2016\nethics: none | needed\n")
    written = json.loads((folder / "metrics.json").read_text())
    train = {
        "EPOCHS": 9,
        "BASE_LR": 1e-4,
        "LR_REFERENCE_BATCH": 32,
        "WARMUP_EPOCHS": 1,
        "LR_SCHEDULER": {"NAME": "cosine"},
    }
    config = {"TRAIN": train, "MODEL": {"PRETRAINED": "/data/weights/b.pth"}, "AUG": {"ROTATION": 5.0}}
    record = {"config": config, "epoch": 2, "images_per_update": 64, "max_accuracy": 0.8125, "best_by": "mean_auc"}
    record |= {"weights": "model"}
    other = tmp_path / "with_record"
    other.mkdir()
    for name in ("predictions.csv", "predictions_validate.csv", "metrics.jsonl"):
        (other / name).write_bytes((folder / name).read_bytes())
    more = {"training": record, "software": {"torch": "2.7", "code": "abc"}, "trained_on": ["mimic_cxr"]}
    (other / "metrics.json").write_text(json.dumps(written | more | {"tested_on": ["mimic_cxr"]}))
    report.main([str(other), "--about", str(about), "--resamples", "200", "--no-images"])
    r = json.loads((other / "report.json").read_text())
    found = {row["what"]: row["text"] for row in r["methods"]}
    assert (
        found["initial weights"] == "b.pth"
        and found["batch"] == "64 images per update"
        and found["code version"] == "abc"
    )
    assert (
        "peak learning rate 0.0002" in found["schedule"]
        and found["augmentation in training"] == "rotation by up to 5.0 degrees"
    )
    assert found["epochs"].startswith("2 done of 9 planned; these are the weights after epoch 2")
    assert "no patient of the test split was in training or validation" in found["splits"]
    text = (other / "report.html").read_text()
    assert "2011-2016" in text and "to fill in: setting in" in text
    rows = (other / "checklist.md").read_text().splitlines()
    claims = {
        number
        for row in rows[6:]
        for number in row.split("|")[1].strip().replace("-", ",").split(",")
        if number.strip()
    }
    assert {"1", "9", "44"} <= {c.strip() for c in claims}
    assert next(x for x in rows if x.endswith('"Methods": dates between which the images were taken |'))
    assert any("TO FILL IN: setting" in x for x in rows) and any("not by this software" in x for x in rows)
    raw = pd.read_csv(other / "predictions.csv")["Edema_label"]
    edema = r["cohort"]["splits"]["test"]["labels"]["Edema"]
    assert (edema["uncertain"], edema["blank"]) == ((raw == -1).sum(), raw.isna().sum())
    for content, message in (
        ("dates", "has no keys; write lines such as"),
        ("date: 5", r"unknown key date \(did you mean dates"),
        ("dates: [1]", "must be a text"),
    ):
        about.write_text(content)
        with pytest.raises(UserError, match=message):
            report.main([str(other), "--about", str(about)])


def test_rates_of_a_group_at_the_threshold_of_the_whole(folder):
    r, rows = (json.loads((folder / "report.json").read_text()), pd.read_csv(folder / "predictions.csv"))
    cut = r["thresholds"]["youden"]["labels"]["Edema"]["threshold"]
    assert set(r["rates"]) == {"view", "site %"}
    for view, found in r["rates"]["view"]["Edema"].items():
        part = rows[rows["view"] == view]
        y, called = part["Edema_target"], part["Edema_probability"] >= cut
        assert found["images"] == len(part) and found["positives"] == y.sum()
        assert found["sensitivity"]["value"] == pytest.approx((called & (y == 1)).sum() / (y == 1).sum())
        assert found["specificity"]["value"] == pytest.approx((~called & (y == 0)).sum() / (y == 0).sum())
        assert found["slope"]["low"] < found["slope"]["value"] < found["slope"]["high"]
    assert not any("sensitivity" in found for found in r["rates"]["view"][NAMES[2]].values())  # one class only


def test_net_benefit_by_its_definition():
    rng = np.random.default_rng(0)
    p, y = rng.random(50), rng.choice([0.0, 1.0, np.nan], 50)
    for t, found in zip((0.2, 0.5), net_benefit(p, y, np.array([0.2, 0.5]))):
        tp = sum(a >= t and b == 1 for a, b in zip(p, y))
        fp = sum(a >= t and b == 0 for a, b in zip(p, y))
        assert found == pytest.approx((tp - fp * t / (1 - t)) / np.isfinite(y).sum())


def test_paths_are_cut_to_their_names_and_nothing_else():
    from analysis.sharing import PATH

    for text, cut in {
        "not used: /data/x y/p.csv: no": "not used: x y/p.csv: no", "~/a/b.csv and ../c": "b.csv and c",
        "C:\\a\\b.csv": "b.csv", "AP / PA, 12 images/s, net/run1": "AP / PA, 12 images/s, net/run1",
        "https://doi.org/10.1/x": "https://doi.org/10.1/x", "Mass /Nodule 1/2 <b>x</b>": "Mass /Nodule 1/2 <b>x</b>",
    }.items():  # fmt: skip
        assert PATH.sub(r"\1", text) == cut


@pytest.mark.parametrize("size, dark", [("1280,1000", False), ("390,844", True)])
def test_axe_finds_nothing(folder, tmp_path, size, dark):
    """AXE_CORE names axe.min.js of the package axe-core."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    axe = Path(os.environ.get("AXE_CORE", "axe.min.js"))
    if browser is None or not axe.is_file():
        pytest.skip("no Chromium, or AXE_CORE names no axe.min.js (npm install axe-core)")
    run = "axe.run().then(r => { document.body.textContent = 'found ' + JSON.stringify(r.violations.map(v => v.id)) })"
    text = (folder / "report.html").read_text().replace(
        "</body>", f"<script>{axe.read_text()}</script><script>{run}</script></body>"
    )  # fmt: skip
    (tmp_path / "page.html").write_text(text)
    argv = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--dump-dom"]
    argv += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000"]
    argv += ["--blink-settings=preferredColorScheme=0"] * dark
    done = subprocess.run([*argv, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120)
    assert "found []" in done.stdout, done.stdout[-500:] + done.stderr[-500:]
