"""Everything a report consists of, written beside its evaluation."""

import csv
import json
from dataclasses import replace
from pathlib import Path

from analysis import card, comparison_tables, figures, page, results, tables
from analysis.groups import read_table
from analysis.sharing import without_paths
from analysis.templates import fill
from common.errors import UserError
from common.files import write_whole


def write_files(folder, texts, table, rows, draw=lambda folder: None, drawn=""):
    """Texts by file name (None removes the file), the rows of the CSV `table`, figures by `draw(folder / drawn)`."""
    try:
        (folder / drawn).mkdir(parents=True, exist_ok=True)
        draw(folder / drawn)
        for name, text in texts.items():
            (folder / name).unlink(missing_ok=True) if text is None else write_whole(folder / name, text)
        with open(folder / table, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output") from error


def _write_one(report, fitted, folder, pictures, no_pictures, model_card):
    """Everything the report of one evaluation consists of, into `folder`."""
    shown = [t for _, _, found, _ in tables.sections(report) for t in found]
    texts = {
        "report.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
        "report.html": page.render(report, pictures, no_pictures),
        "tables.tex": fill("tables.tex.j2", tables=[t for t in shown if t.key != "stated" or report["stated"]]),
        "summary.md": tables.summary(report),
        "model_card.md": model_card,
        "checklist.md": card.checklist(report),
        # None: that of an earlier report with other predictions goes.
        "calibration.json": None if fitted is None else json.dumps(fitted, indent=1) + "\n",
    }
    rows = [tables.CSV_COLUMNS, *tables.per_label(report)]
    write_files(folder, texts, "per_label.csv", rows, lambda drawn: figures.write_figures(report, drawn), "figures")


def write_report(evaluation, options, folder, against=(), seeds=(), *, with_images=True, share=False, stated=None):
    """Measure, and write to `folder`; returns the report's dictionary.

    with_images: with the worst errors, their images and ids; share: without them and without paths, to be passed on;
    stated: what the authors state, see analysis.card.read_about.
    """
    if not options.tables:
        options = replace(options, tables=_patients_tables(evaluation))
    report, fitted = results.collect(evaluation, options, against, seeds, stated)
    report = {"headline": tables.headline(report)} | report
    named = without_paths([report, fitted], [evaluation, *against, *seeds], options.tables)
    if share:
        report, fitted = named
    pictures, reason = {}, None
    if with_images and not share:
        pictures, reason = page.thumbnails(evaluation, report["errors"])
    else:
        report["errors"] = {}
    _write_one(report, fitted, folder, pictures, reason, card.model_card(named[0]))
    return report


def write_comparison(report, folder, evaluations, share=False):
    """The report of several evaluations, a dictionary of analysis.comparison, to `folder`; share: without paths."""
    report = without_paths(report, evaluations) if share else report
    report = {"headline": comparison_tables.headline(report), **report}
    found = [t for _, _, shown, _ in comparison_tables.sections(report) for t in shown]
    texts = {
        "report.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
        "tables.tex": fill("tables.tex.j2", tables=found),
        "summary.md": comparison_tables.summary(report),
    }

    def draw(drawn):
        figures.write_forest(comparison_tables.panels(report), drawn)
        texts["report.html"] = page.render_comparison(report, drawn / "auroc.svg")  # the page holds the figure

    write_files(folder, texts, "per_label.csv", comparison_tables.per_label(report), draw, "figures")


def _patients_tables(evaluation):
    """patients.csv.gz of MIMIC-IV and, for the studies' dates, metadata.csv.gz of MIMIC-CXR, if they are beside the
    evaluation's images and know its patients."""
    data = evaluation.config.get("DATA", {})
    # Of several sources none: its ids are those of one.
    roots = [] if data.get("SOURCES") else filter(None, (data.get("DATA_PATH"), evaluation.metrics.get("root")))
    folders = dict.fromkeys(
        folder for root in map(Path, roots) for folder in (root.expanduser(), root.expanduser().parent)
    )
    found = []
    for pattern in ("patients.csv*", "mimic-cxr-*-metadata.csv*"):
        for path in (path for folder in folders for path in sorted(folder.glob(pattern))):
            try:
                read_table(path, evaluation.test)
            except UserError as error:
                print(f"not used: {error}")
                continue
            found.append(path)
            break
    return tuple(found)
