"""What report.py fitted on the validation split, for the probabilities of new images."""

import json
from pathlib import Path

import numpy as np

from common.errors import UserError
from dataset.files.domain import kinds


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
    """calibration.json of an evaluation -> (function of probabilities [N, L] -> [N, L], what it was fitted for).

    Of each label what `chosen` says, see analysis.calibration. Files of earlier versions have no such choice: then
    Platt scaling where its slope is positive, else the temperature.

    Raises:
        UserError: no such file, or a label that it does not have.
    """
    from analysis.calibration import scale

    path, content = _read(evaluation, "calibration.json")
    chosen, platt, temperature = content.get("chosen"), content.get("platt") or {}, content.get("temperature")
    fault = UserError(
        f"{path} is not a calibration.json of report.py: its values are no numbers; make the report again"
    )
    if not isinstance(platt, dict) or not isinstance(chosen, dict | None):
        raise fault

    def method(name):
        if chosen is not None:
            return chosen[name]["method"] if name in chosen else None
        if platt.get(name) and platt[name]["slope"] > 0:
            return "platt"
        return None if temperature is None else "temperature"

    def adjust(probabilities):
        return np.stack([scale(content, methods[name], name, p) for name, p in zip(label_names, probabilities.T)], 1)

    try:
        methods = {name: method(name) for name in label_names}
        if lacking := [name for name, found in methods.items() if found is None]:
            raise UserError(f"{path} has no calibration of {', '.join(lacking)}; predict without --calibrated")
        if not np.isfinite(adjust(np.full((1, len(label_names)), 0.5))).all():
            raise fault
    except UserError:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise fault from error
    return adjust, _fitted_for(content, content)


def _fitted_for(content, older):
    """`fitted_for` of a file, see Evaluation.fitted_for; of an older file, the digest that it has."""
    digest = older.get("checkpoint_sha256")
    found = content.get("fitted_for")
    return found if isinstance(found, dict) else {"checkpoints_sha256": digest and [digest]}


def read_thresholds(evaluation, rule, label_names):
    """report.json of an evaluation -> ({label: threshold, None where the validation split has none}, what they were
    fitted for).

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
    about = content.get("about")
    return cuts, _fitted_for(content, about if isinstance(about, dict) else {})


def differences(option, evaluation, fitted_for, *, checkpoints_sha256, ema, tta, dicom_recipe):
    """Notes, a line each: in what a prediction differs from what `option EVALUATION` was fitted for.

    fitted_for: as the functions above return it. checkpoints_sha256: of the checkpoints of the prediction.
    dicom_recipe: how the prediction reads DICOM, None where that is not known or no matter.
    """
    then, start = fitted_for.get("checkpoints_sha256"), f"{option} {evaluation} was fitted"
    found = []
    if not then:
        found.append(f"{option} {evaluation} does not record the checkpoint that it was fitted for")
    elif sorted(then) != sorted(checkpoints_sha256):
        shown = ", ".join(f"{digest[:12]}..." for digest in then)
        found.append(f"{start} for another checkpoint (sha256 {shown})")
    for flag, now in (("ema", ema), ("tta", tta)):
        before = fitted_for.get(flag)
        if before is not None and before != now:
            then, here = ("with" if value else "without" for value in (before, now))
            found.append(f"{start} {then} --{flag}, this prediction is {here} it")
    domain = fitted_for.get("domain")
    if domain and dicom_recipe and kinds(domain) != kinds(f"dicom {dicom_recipe}"):
        found.append(f"{start} on images of the kind {domain}, DICOM is read here by --dicom-recipe {dicom_recipe}")
    return found
