"""What accompanies a report: model_card.md, what the authors state (--about FILE.yaml), and checklist.md: where the
report has what guidelines ask for."""

from pathlib import Path

from analysis import tables
from analysis.tables import ASKED
from analysis.templates import fill
from common.errors import UserError, did_you_mean
from common.files import read_yaml

NOT_BY_US = "not by this software"


def read_about(path):
    """{key of ASKED["about"]: text} of a YAML file.

    UserError: not a YAML file of such keys and texts.
    """
    keys = ", ".join(ASKED["about"])
    remedy = f"; write lines such as `dates: 2011 to 2016` (keys: {keys})"
    content = read_yaml(Path(path).expanduser(), f"--about {path}", remedy=remedy)
    for key, value in content.items():
        if key not in ASKED["about"]:
            nearest = did_you_mean(key, ASKED["about"])
            raise UserError(f"--about {path}: unknown key {key}{nearest}; the keys are {keys}")
        if isinstance(value, dict | list):
            raise UserError(f"--about {path}: {key} must be a text, got {value!r}")
    return {key: " ".join(str(value).split()) for key, value in content.items() if value not in (None, "")}


def _place(where, titles, stated):
    """Where a report has something, as a sentence."""
    if where is False:  # YAML's no
        return NOT_BY_US
    if where in stated:
        return f'report.html, "{titles["methods"]}": {ASKED["about"][where]}'
    if where in ASKED["about"]:
        return f"TO FILL IN: {where} in report.py --about FILE.yaml"
    if where in titles:
        return f'report.html, "{titles[where]}"'
    return where if "." in where else f"not in this report ({where})"


def checklist(report):
    """checklist.md as text."""
    titles = {key: title for key, title, _, reason in tables.sections(report) if not reason}
    items = [
        (*item, "; ".join(_place(where, titles, report["stated"]) for where in places))
        for *item, places in ASKED["items"]
    ]
    return fill("checklist.md.j2", title=tables.title(report), items=items)


def model_card(report):
    """The card as Markdown."""
    about, wanted = report["about"], ("frequency", "labels", "mapping", "study", "cohort")
    return fill(
        "model_card.md.j2", report=report, headline=tables.headline(report), note=tables.note(report),
        policy=tables.policy_text(report), split_names=tables.SPLIT_NAMES,
        checkpoint=about["checkpoint"] and Path(about["checkpoint"]).name,
        ensemble=[Path(given).name for given in about["ensemble"] or []],
        external=about["trained_on"] and not set(about["tested_on"]) & set(about["trained_on"]),
        tables=[t for key, _, found, _ in tables.sections(report) if key in wanted for t in found],
    )  # fmt: skip
