"""What report.py fitted on the validation split, for the probabilities of new images."""

from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_json
from dataset.files.domain import kinds


def read_content(evaluation, name):
    """(path, dictionary) of a file that report.py wrote into an evaluation."""
    path = Path(evaluation)
    path = path / name if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: No such file or directory; make it with report.py {evaluation}")
    return path, read_json(path, f"a {name} of report.py")


def _fitted_for(content):
    found = content.get("fitted_for")
    return found if isinstance(found, dict) else {}


def read_calibration(evaluation, label_names):
    """calibration.json of an evaluation -> (function of probabilities [N, L] -> [N, L], `fitted_for`).

    Of each label what `chosen` says, see analysis.calibration. `fitted_for`: see Evaluation.fitted_for.

    UserError: no such file, or a label that it does not have.
    """
    from analysis.calibration import scale

    path, content = read_content(evaluation, "calibration.json")
    chosen = content.get("chosen")

    def adjust(probabilities):
        of_label = zip(label_names, probabilities.T)
        return np.stack([scale(content, chosen[name]["method"], name, p) for name, p in of_label], 1)

    if isinstance(chosen, dict) and (lacking := [name for name in label_names if name not in chosen]):
        raise UserError(f"{path} has no calibration of {', '.join(lacking)}; predict without --calibrated")
    try:
        whole = np.isfinite(adjust(np.full((1, len(label_names)), 0.5))).all()
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise UserError(
            f"{path} is not a calibration.json of report.py: its values are no numbers; make the report again"
        )
    return adjust, _fitted_for(content)


def read_thresholds(evaluation, rule, label_names):
    """report.json of an evaluation -> ({label: threshold, None where the validation split has none}, `fitted_for`).

    UserError: no such file, rule or label.
    """
    path, content = read_content(evaluation, "report.json")
    rules = content.get("thresholds") or {}
    if not isinstance(rules.get(rule), dict) or not isinstance(rules[rule].get("labels"), dict):
        why = rules.get("left_out") or f"choose one of {', '.join(k for k in rules if isinstance(rules[k], dict))}"
        raise UserError(f"{path} has no thresholds by the rule {rule!r}: {why}")
    labels = rules[rule]["labels"]
    if lacking := [name for name in label_names if name not in labels]:
        raise UserError(f"{path} is of a model with other labels: it has none of {', '.join(lacking)}")
    cuts = {name: isinstance(labels[name], dict) and labels[name].get("threshold", False) for name in label_names}
    for name, cut in cuts.items():
        if cut is not None and (isinstance(cut, bool) or not isinstance(cut, int | float)):
            raise UserError(f"{path} is not a report.json of report.py: the threshold of {name} is no number")
    return cuts, _fitted_for(content)


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
