"""What report.py fitted on the validation split, for the probabilities of new images."""

import json
from pathlib import Path

import numpy as np

from common.errors import UserError


def _read(evaluation, name):
    path = Path(evaluation)
    path = path / name if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make it with report.py {evaluation}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a {name} of report.py")
    return path, content


def read_calibration(evaluation, label_names):
    """calibration.json of an evaluation -> (function of probabilities [N, L], digest of its checkpoint or None).

    Platt's scaling of each label; where the validation split could not fit it, the temperature of all labels.

    Raises:
        UserError: no such file, or a label without either.
    """
    from analysis.calibration import apply_platt, apply_temperature

    path, content = _read(evaluation, "calibration.json")
    platt, temperature = content.get("platt") or {}, content.get("temperature")
    if not isinstance(platt, dict):
        raise UserError(f"{path} is not a calibration.json of report.py: its platt is no dictionary")
    lacking = [name for name in label_names if platt.get(name) is None and temperature is None]
    if lacking:
        raise UserError(f"{path} has no calibration of {', '.join(lacking)}; predict without --calibrated")

    def adjust(probabilities):
        columns = [
            apply_platt(column, platt[name]) if platt.get(name) else apply_temperature(column, temperature)
            for name, column in zip(label_names, probabilities.T)
        ]
        return np.stack(columns, 1)

    try:
        adjust(np.full((1, len(label_names)), 0.5))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a calibration.json of report.py: its values are no numbers") from error
    return adjust, content.get("checkpoint_sha256")


def read_thresholds(evaluation, rule, label_names):
    """report.json of an evaluation -> {label: threshold, None where the validation split has none}.

    Raises:
        UserError: no such file, rule or label.
    """
    path, content = _read(evaluation, "report.json")
    rules = content.get("thresholds") or {}
    if not isinstance(rules.get(rule), dict) or not isinstance(rules[rule].get("labels"), dict):
        why = rules.get("left_out") or f"choose one of {', '.join(k for k in rules if isinstance(rules[k], dict))}"
        raise UserError(f"{path} has no thresholds by the rule {rule!r}: {why}")
    labels = rules[rule]["labels"]
    lacking = [name for name in label_names if name not in labels]
    if lacking:
        raise UserError(f"{path} is of a model with other labels: it has none of {', '.join(lacking)}")
    cuts = {name: isinstance(labels[name], dict) and labels[name].get("threshold", False) for name in label_names}
    for name, cut in cuts.items():
        if cut is not None and (isinstance(cut, bool) or not isinstance(cut, int | float)):
            raise UserError(f"{path} is not a report.json of report.py: the threshold of {name} is no number")
    return cuts
