"""The report of an evaluation of one class of many: accuracy with intervals, per class, and the worst confusions.

Its predictions.csv has a row per image: ids, `target`, `prediction_1`, `probability_1`, ... of up to five classes, the
most probable first; `acc1` and `acc5` are 1 if the target is among the first, 0 if not, a share if logits are equal.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import page
from analysis.statistics import wilson
from analysis.tables import Cell, Table, count, figure, share
from analysis.templates import fill, md
from analysis.writing import write_files
from common.errors import UserError

WORST = 20  # confusions that are listed
NOTE = "95% intervals: Wilson's, of images that are independent of each other."


def is_evaluation(folder):
    """Whether a folder holds such an evaluation."""
    try:
        return "acc1" in json.loads((Path(folder) / "metrics.json").read_text())
    except (OSError, ValueError):
        return False


def _accuracy(hits):
    low, high = wilson(np.asarray(hits, float), np.ones(len(hits)))
    return {"value": float(np.mean(hits)), "low": low, "high": high}


def collect(metrics, found):
    """The report as a dictionary; metrics: of metrics.json; found: the DataFrame of predictions.csv."""
    wrong = found[found["acc1"] < 1]
    pairs = wrong.groupby(["target", "prediction_1"]).size().sort_values(ascending=False, kind="stable")[:WORST]
    images = found.groupby("target").size()
    return {
        "accuracy": {key: _accuracy(found[key]) for key in ("acc1", "acc5")},
        "images": len(found),
        "classes": {name: {"images": len(hits)} | _accuracy(hits) for name, hits in found.groupby("target")["acc1"]},
        "absent": metrics.get("absent", []),
        "confusions": [
            {"target": target, "prediction": prediction, "images": int(n), "share": float(n / images[target])}
            for (target, prediction), n in pairs.items()
        ],
        "about": {key: metrics.get(key) for key in ("checkpoint", "dataset", "backbone", "loss", "warnings")},
    }


def headline(report):
    top1, top5 = (figure(report["accuracy"][key]).text for key in ("acc1", "acc5"))
    absent = report["absent"]
    lacking = f"; no image of {len(absent):,} of the classes: {', '.join(absent[:10])}{', ...' * (len(absent) > 10)}"
    return f"top-1 accuracy {top1}, top-5 {top5}, {report['images']:,} images" + lacking * bool(absent)


def _tables(report):
    rows = [[Cell(name, name), figure(f, line=True), count(f["images"])] for name, f in report["classes"].items()]
    rows.sort(key=lambda row: row[1].sort)
    confused = [
        [Cell(c["target"], c["target"]), Cell(c["prediction"]), count(c["images"]), share(c["share"])]
        for c in report["confusions"]
    ]
    return [
        Table("confusions", "Worst confusions", "", "Share: of the images of the class.",
              ["class", "predicted as", "images", "share"], confused),
        Table("classes", "Accuracy per class, the lowest first", NOTE, "", ["class", "top-1 accuracy", "images"], rows),
    ]  # fmt: skip


def write_report(evaluation, folder=None):
    """report.html, report.json, summary.md and per_class.csv of an evaluation's folder, into `folder`; the headline."""
    evaluation, folder = Path(evaluation), Path(folder or evaluation)
    try:
        metrics = json.loads((evaluation / "metrics.json").read_text())
        found = pd.read_csv(evaluation / "predictions.csv", dtype={"target": str, "prediction_1": str}, na_filter=False)
        report = collect(metrics, found)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{evaluation} is not a whole evaluation ({error}); evaluate again") from error
    said, shown, about = headline(report), _tables(report), report["about"]
    facts = [(key, str(about[key])) for key in ("checkpoint", "backbone", "dataset") if about[key]]
    title = f"{about['backbone'] or evaluation.name} on {about['dataset'] or 'its test split'}"
    sections = [(t.key, t.title, [t], None) for t in shown]
    texts = {
        "report.json": json.dumps({"headline": said, **report}, indent=1) + "\n",
        "report.html": page.render_classes(title, [said, *(about["warnings"] or [])], facts, sections),
        "summary.md": fill("summary.md.j2", title=title, lead=md(said), shared="", sections=sections),
    }
    rows = [(name, f["images"], f["value"], f["low"], f["high"]) for name, f in report["classes"].items()]
    rows.insert(0, ("class", "images", "accuracy", "low", "high"))
    write_files(folder, texts, "per_class.csv", rows)
    return said
