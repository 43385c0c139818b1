"""What the authors state (--about FILE.yaml), and checklist.md: where a report has what guidelines ask for."""

from pathlib import Path

import yaml

from analysis import tables
from analysis.tables import ASKED
from common.errors import UserError, did_you_mean

NOT_BY_US = "not by this software"


def read_about(path):
    """{key of ASKED["about"]: text} of a YAML file.

    Raises:
        UserError: not a YAML file of such keys and texts.
    """
    path = Path(path).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--about {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--about {path} is not valid YAML: {' '.join(str(error).split())}") from error
    keys = ", ".join(ASKED["about"])
    if not isinstance(content, dict):
        raise UserError(f"--about {path} holds no keys; write lines such as `dates: 2011 to 2016` (keys: {keys})")
    for key, value in content.items():
        if key not in ASKED["about"]:
            raise UserError(
                f"--about {path}: unknown key {key}{did_you_mean(key, ASKED['about'])}; the keys are {keys}"
            )
        if isinstance(value, dict | list):
            raise UserError(f"--about {path}: {key} must be a text, got {value!r}")
    return {key: " ".join(str(value).split()) for key, value in content.items() if value not in (None, "")}


def _place(where, titles, stated):
    """Where a report has something, as a sentence."""
    if where is False:  # YAML's no
        return NOT_BY_US
    if where in ASKED["about"]:
        if where in stated:
            return f'report.html, "{titles["methods"]}": {ASKED["about"][where]}'
        return f"TO FILL IN: {where} in report.py --about FILE.yaml"
    if where in titles:
        return f'report.html, "{titles[where]}"'
    return where if "." in where else f"not in this report ({where})"


def checklist(report):
    """checklist.md as text."""
    sections = tables.sections(report)
    titles = {key: title for key, title, _, reason in sections if not reason}
    rows = []
    for claim, tripod, asked, places in ASKED["items"]:
        found = "; ".join(_place(where, titles, report["stated"]) for where in places)
        rows.append("| " + " | ".join([claim, tripod, asked, tables.plain_markdown(found)]) + " |")
    return "\n".join([
        f"# Checklist: {tables.plain_markdown(tables.title(report))}", "",
        "Items of CLAIM 2024 and TRIPOD+AI in short words; compare them with the guidelines before you submit.", "",
        "| CLAIM | TRIPOD+AI | item | where |", "|---|---|---|---|", *rows,
    ]) + "\n"  # fmt: skip
