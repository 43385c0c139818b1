"""Faults of the machine, known by the exceptions they raise: one line that says what to do, of faults.yaml."""

import re
from pathlib import Path

import yaml

FAULTS = yaml.safe_load(Path(__file__).with_name("faults.yaml").read_text(encoding="utf-8"))


def explain(error, config, world):
    """The fault behind an exception in one line, or None where it is not known."""
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    matches = ((re.search(pattern, text), meaning) for pattern, meaning in FAULTS.items())
    return next((meaning.format(found=found, config=config, world=world) for found, meaning in matches if found), None)
