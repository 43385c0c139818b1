"""The templates of this folder (*.j2). Pages escape what they print; Markdown does it by `md`, LaTeX by `tex`."""

import re
from pathlib import Path

import jinja2

from config import units

_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "–": "--", "†": r"$^\dagger$", "≥": r"$\geq$", "≤": r"$\leq$", "±": r"$\pm$"}  # fmt: skip


def tex(text):
    """Text that LaTeX prints as it is."""
    return "".join(_TEX.get(c, c) for c in " ".join(text.split()))


def md(text):
    """Text that Markdown prints as it is: names of labels and groups may hold its signs."""
    return re.sub(r"[\\`*<>\[\]|~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def first_sorted(column):
    """How the first click sorts a column, the best first: "up" where small is good and for names, else "down"."""
    return "up" if re.match(r"(label|model|run|p|SE|SD|slope|intercept|Brier|ECE|FP|FN)\b", column) else "down"


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
    autoescape=lambda name: name.endswith((".html.j2", ".svg.j2")), undefined=jinja2.StrictUndefined,
)  # fmt: skip
ENVIRONMENT.filters |= {"tex": tex, "md": md, "first_sorted": first_sorted, "units": units}


def fill(template, **values):
    """The text of a template with these values."""
    return ENVIRONMENT.get_template(template).render(**values).rstrip() + "\n"
