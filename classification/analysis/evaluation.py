"""The folder of an evaluation, and tables of predictions of any model: written, read, checked.

metrics.json                what was evaluated: loss, AUROC by label, counts, checkpoint and its digest, domain,
                            dataset and those trained on, label policy, config, cohort, label_mapping: {label:
                            {"from": its names in the release, "kind": exact, approximate or unknown}}
predictions.csv             the test split, one row an image: ids (dicom_id, study_id, subject_id, view, path: what
                            is known), then of every label `<label>_target` (1, 0 or empty: after the policy),
                            `<label>_probability`, `<label>_logit` (what images are ranked by: probabilities of
                            logits above 18 are all 1; tables of other programs need not have it) and, where the data
                            has it, `<label>_label` (as in the label file: 1, 0, -1 or empty), by which other policies
                            can be tried. With DATA.UNIT study one row a study: study_id, subject_id, `images`, the
                            dicom_ids that were read, `views`, theirs, and `path`, of the first one
predictions_validate.csv    the validation split by the same checkpoint
metrics.jsonl               the training run's epochs
"""

import contextlib
import itertools
import json
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.metrics import METRICS, label_metrics
from common.errors import UserError
from common.files import read_json, write_whole
from common.folders import output_folder
from config import KNOBS, units
from dataset.tables import first_row, need_columns, no_duplicates, read_csv

TEST, VALIDATE = "predictions.csv", "predictions_validate.csv"
SUFFIXES = ("_target", "_probability", "_logit", "_label")
IMAGE_IDS = ("dicom_id", "path")
FRONTAL = ("AP", "PA", "frontal")


# ------------------------------------------------------------------------------------------ write
def new_evaluation(parent, what="evaluation"):
    """A new folder `evaluation_<timestamp>` in `parent`, made before the work whose results it takes; two evaluations
    within one second get two."""
    name = datetime.now().strftime(f"{what}_%Y%m%d_%H%M%S")
    for k in itertools.count(1):
        folder = output_folder(parent, "RESULTS") / (name + f"_{k}" * (k > 1))
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def write_evaluation(folder, metrics, predicted, epochs=None):
    """The files at the head of this module.

    predicted: file name -> (dataset of the split, metrics of a task's `test` with `rows` and, of labels, `targets`,
    `probabilities` and `logits`, else the `columns` of the table).
    epochs: metrics.jsonl of the training run, kept if it is there.
    """
    for name, (dataset, found) in predicted.items():
        rows = found["rows"]
        columns = dataset.ids() | getattr(dataset, "descriptions", dict)()
        ids = {column: np.asarray(values)[rows] for column, values in columns.items()}
        if "columns" in found:
            _write_table(folder / name, ids | found["columns"])
            continue
        labels = getattr(dataset, "labels", None)
        labels, values = None if labels is None else labels[rows], (found["targets"], found["probabilities"])
        write_predictions(folder / name, ids, dataset.label_names, *values, labels, found.get("logits"))
    if epochs is not None and epochs.is_file():
        write_whole(folder / "metrics.jsonl", epochs.read_text())
    # Last: a folder that has it is whole.
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def _write_table(path, columns):
    write_whole(path, pd.DataFrame(columns).to_csv(index=False, float_format="%.8g"))


def write_predictions(path, ids, label_names, targets, probabilities, labels=None, logits=None):
    """A table of predictions, see the head of this file.

    ids: column name -> values [N]; targets, probabilities, labels, logits: [N, L]; NaN is written as an empty field.
    Probabilities have eight digits; logits nine, which keep every float32 apart.
    """
    columns = dict(ids)
    for k, name in enumerate(label_names):
        columns[f"{name}_target"] = targets[:, k]
        columns[f"{name}_probability"] = probabilities[:, k]
        if logits is not None:
            columns[f"{name}_logit"] = [f"{z:.9g}" for z in logits[:, k]]
        if labels is not None:
            columns[f"{name}_label"] = labels[:, k]
    _write_table(path, columns)


# ------------------------------------------------------------------------------------------- read
@dataclass
class Predictions:
    """A table of predictions; one row an image, or a study (see :meth:`by_study`).

    ids: text columns, blank where unknown; targets: 1, 0, NaN (unknown); labels: as in the label file, or None;
    logits: None where the table has none.
    """

    path: Path
    label_names: tuple
    ids: pd.DataFrame
    targets: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray | None = None
    logits: np.ndarray | None = None

    def __len__(self):
        return len(self.targets)

    @property
    def scores(self):
        """What images are ranked by, [N, L]."""
        return self.probabilities if self.logits is None else self.logits

    def _arrays(self, change):
        """The arrays by name, each that is not None as change(array)."""
        arrays = {name: getattr(self, name) for name in ("targets", "probabilities", "labels", "logits")}
        return {name: None if values is None else change(values) for name, values in arrays.items()}

    @property
    def row(self):
        """What a row is: an image, or a study with the column `images`."""
        return "study" if "images" in self.ids else "image"

    @property
    def unit(self):
        """What the bootstrap draws: patients where they are known, else rows."""
        return "patient" if "subject_id" in self.ids else self.row

    @property
    def clusters(self):
        """(number of each row's patient [N], number of patients); without patients each row is its own."""
        if self.unit != "patient":
            return np.arange(len(self)), len(self)
        codes, patients = pd.factorize(self.ids["subject_id"], sort=True)
        return codes, len(patients)

    @property
    def image_ids(self):
        """What names each row: dicom_id, else path; without either its place in the table. Of a study its patient's id
        and its own."""
        if self.row == "study":
            return self.ids[[c for c in ("subject_id", "study_id") if c in self.ids]].agg("/".join, axis=1)
        column = next((c for c in IMAGE_IDS if c in self.ids), None)
        return self.ids[column] if column else pd.Series([f"row {k + 1}" for k in range(len(self))])

    def select(self, rows):
        ids = self.ids.iloc[rows].reset_index(drop=True)
        return replace(self, ids=ids, **self._arrays(lambda values: values[rows]))

    def with_labels(self, names):
        """The same rows with these of its labels, in this order."""
        k = [self.label_names.index(name) for name in names]
        return replace(self, label_names=tuple(names), **self._arrays(lambda values: values[:, k]))

    def by_study(self, how="mean", frontal=False):
        """One row a study: the mean (or max) of its images' probabilities; target 1 if any image has it.

        frontal: of its AP and PA images only; a study without any is left out.

        UserError: no study_id, or no view where frontal is asked for.
        """
        for column, wanted in (("study_id", True), ("view", frontal)):
            if wanted and column not in self.ids:
                raise UserError(f"{self.path} has no column {column}")
        part = self.select(self.ids["view"].isin(FRONTAL).to_numpy()) if frontal else self
        if len(part) == 0:
            raise UserError(f"{self.path} has no frontal image (view AP or PA)")
        keep = [c for c in ("subject_id", "study_id") if c in part.ids]
        study, keys = pd.factorize(part.ids[keep].agg("/".join, axis=1).to_numpy())
        first = np.unique(study, return_index=True)[1]

        def grouped(values, how):
            return pd.DataFrame(values).groupby(study).agg(how).to_numpy()

        logits = part.logits
        if logits is not None:
            logits = grouped(logits, how) if how == "max" else logit_of_mean(logits, study)
        ids = part.ids.iloc[first][keep].reset_index(drop=True)
        probabilities, targets = grouped(part.probabilities, how), grouped(part.targets, "max")
        return replace(part, ids=ids, targets=targets, probabilities=probabilities, labels=None, logits=logits)


def logit_of_mean(logits, group):
    """Logit of the mean probability of each group of rows: [N, L], numbers of groups [N] -> [groups, L].

    By logarithms, since probabilities of 1 would all be one.
    """
    shape = (int(group.max()) + 1, logits.shape[1])
    up, down = np.full(shape, -np.inf), np.full(shape, -np.inf)
    np.logaddexp.at(up, group, -np.logaddexp(0, -logits))
    np.logaddexp.at(down, group, -np.logaddexp(0, logits))
    return up - down


@dataclass
class Evaluation:
    """An evaluation folder, or a lone table of predictions (then without metrics)."""

    given: str  # as on the command line
    path: Path
    test: Predictions
    validate: Predictions | None = None
    metrics: dict = field(default_factory=dict)
    validate_of: str | None = None  # digest of the checkpoint that predicted the validation split, where recorded

    @property
    def name(self):
        return self.path.name if self.path.is_dir() else self.path.stem

    @property
    def folder(self):
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def config(self):
        return self.metrics.get("config", {})

    @property
    def epochs_file(self):
        """The training run's metrics.jsonl, kept in the folder or beside the checkpoint; None where neither is."""
        folders = [self.path] if self.metrics else []
        folders += [Path(self.metrics["checkpoint"]).parent] if "checkpoint" in self.metrics else []
        return next((path for f in folders if (path := f / "metrics.jsonl").is_file()), None)

    @property
    def fitted_for(self):
        """What thresholds and calibration of this evaluation hold for, see analysis.applied.

        ema: None where it is not recorded or no matter (the checkpoint holds averaged weights alone).
        """
        digests = self.metrics.get("checkpoints_sha256") or [self.validate_of]
        return {
            "checkpoints_sha256": None if None in digests else digests,
            "ema": self.metrics.get("ema"),
            "tta": bool(self.config.get("TEST", {}).get("TTA")),
            "domain": (self.metrics.get("domain") or {}).get("tested"),
        }

    @property
    def policy(self):
        """{"uncertain": ..., "missing": ...}: what -1 and blanks became; None where nothing says it."""
        data = self.config.get("DATA", {})
        recorded = {"uncertain": data.get("UNCERTAIN"), "missing": data.get("MISSING")}
        return self.metrics.get("label_policy", recorded if recorded["uncertain"] else None)


def _numbers(frame, column, path):
    texts = frame[column].str.strip()
    values = pd.to_numeric(texts.str.replace(",", "."), errors="coerce")  # 0,5 beside semicolons
    bad = (values.isna() & (texts != "")).to_numpy()
    if bad.any():
        row = first_row(bad)
        raise UserError(f"{path}: {column} is {frame[column].iloc[row]!r} in data row {row + 1}; not a number")
    return values.to_numpy(float)


def clean_id(column):
    """Ids as text without blanks around them; 10000032.0, as some programs write it, is 10000032."""
    return column.astype("string").str.strip().str.replace(r"^(\d+)\.0$", r"\1", regex=True)


def read_predictions(path):
    """The :class:`Predictions` in a CSV. UserError: names the file, the column and the row."""
    path = Path(path)
    frame = read_csv(path, ())
    need_columns(frame, frame.columns, path)
    names = tuple(c.removesuffix("_probability") for c in frame.columns if c.endswith("_probability"))
    targets = [c.removesuffix("_target") for c in frame.columns if c.endswith("_target")]
    if not names:
        raise UserError(
            f"{path} holds no predictions: expected the columns <label>_target and <label>_probability of every label "
            f"(the file has: {', '.join(frame.columns[:8])}{', ...' if len(frame.columns) > 8 else ''})"
        )
    for name in [*names, *targets]:
        lacks = "_target" if name not in targets else "_probability" if name not in names else None
        if lacks:
            raise UserError(f"{path}: the label {name!r} has no column {name}{lacks}")

    def columns(suffix):
        return np.stack([_numbers(frame, name + suffix, path) for name in names], 1)

    y, p = columns("_target"), columns("_probability")
    labels, logits = (columns(s) if all(name + s in frame for name in names) else None for s in ("_label", "_logit"))
    for suffix, good, wanted in (
        ("_probability", (p >= 0) & (p <= 1), "a probability from 0 to 1"),
        ("_target", np.isin(y, (0, 1)) | np.isnan(y), "1, 0 or nothing (unknown)"),
        ("_logit", np.isfinite(0 if logits is None else logits), "a finite number"),
    ):
        if not good.all():
            row, k = np.argwhere(~good)[0]
            raise UserError(
                f"{path}: {names[k]}{suffix} is {frame[names[k] + suffix].iloc[row]!r} in data row {row + 1}; expected "
                f"{wanted} ({int((~good).sum()):,} such values in the file)"
            )
    ids = frame[[c for c in frame.columns if not c.endswith(SUFFIXES)]].apply(clean_id)
    if "subject_id" in ids:
        blank = ids["subject_id"].isin(["", "-1"]).to_numpy()
        if blank.all():
            ids = ids.drop(columns="subject_id")
        elif blank.any():
            raise UserError(
                f"{path}: subject_id is empty in {int(blank.sum()):,} of {len(ids):,} rows, first in data row "
                f"{first_row(blank) + 1}; give every image its patient, or leave the column out (the bootstrap then "
                "draws images)"
            )
    if "study_id" in ids and ids["study_id"].isin(["", "-1"]).any():
        ids = ids.drop(columns="study_id")
    found = Predictions(path, names, ids.astype(object), y, p, labels, logits)
    no_duplicates(found.image_ids, f"the {found.row}", path)
    return found


# What a report reads of metrics.json, where it is there.
KINDS = {
    **dict.fromkeys(("training", "software"), dict),
    **dict.fromkeys(
        ("config", "cohort", "label_groups", "label_mapping", "label_policy", *(m.name for m in METRICS)), dict
    ),
    **dict.fromkeys(("images", "skipped", "parameters"), int),
    **dict.fromkeys(("gmacs", "images_per_s"), (int, float)),
    **dict.fromkeys(
        ("checkpoint", "checkpoint_sha256", "root", "dataset", "primary_metric", "backbone", "device"), str
    ),
}
METRICS_FILE = "the metrics.json of an evaluation"
KINDS_OF_SETTINGS = {"DATA": dict, "MODEL": dict, "TEST": dict, "TRAIN": dict, "SEED": int}


def _read_metrics(folder, test):
    path = folder / "metrics.json"
    metrics = read_json(path, METRICS_FILE)
    settings = metrics.get("config")
    for where, keys in ((metrics, KINDS), (settings if isinstance(settings, dict) else {}, KINDS_OF_SETTINGS)):
        for key, kind in keys.items():
            if key in where and not isinstance(where[key], kind):
                raise UserError(f"{path} is not as main.py --eval wrote it: {key} is {where[key]!r}; evaluate again")
    if metrics.get("images", len(test)) != len(test):
        raise UserError(
            f"{test.path} has {len(test):,} rows, but {path.name} beside it counts {metrics['images']:,} images; "
            "the table is not whole, evaluate again"
        )
    labels = next((metrics[metric.name] for metric in METRICS if metric.name in metrics), test.label_names)
    _check_labels(test.path, test.label_names, f"{path.name} beside it", tuple(labels))
    return metrics


def _check_labels(path, ours, others, theirs):
    """UserError where the labels `ours` of `path` are not, in this order, those of `others`."""
    extra, lacking = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    parts = [f"{len(n)} {what} ({', '.join(n)})" for what, n in (("missing", lacking), ("more", extra)) if n]
    if ours != theirs:
        raise UserError(f"{path} has other labels than {others}: {', '.join(parts) or 'another order'}")


def _check_validate(test, validate):
    _check_labels(validate.path, validate.label_names, test.path, test.label_names)
    for what, column in (("patients", "subject_id"), ("images", "dicom_id"), ("images", "path")):
        if shared := set(test.ids.get(column, ())) & set(validate.ids.get(column, ())):
            raise UserError(
                f"{validate.path} and {test.path} share {what} ({len(shared):,}), such as {min(shared)}: thresholds "
                "and calibration are never fitted on the test split"
            )


def read_evaluation(given, validate=None):
    """The :class:`Evaluation` in a folder, or of a table of predictions.

    validate: a table of the validation split instead of the folder's own.

    UserError: names the file and what is wrong with it.
    """
    path, remedy = Path(given).expanduser(), "give a folder that main.py --eval wrote, or a CSV of predictions"
    if path.is_dir():
        if lacks := next((name for name in (TEST, "metrics.json") if not (path / name).is_file()), None):
            raise UserError(f"{path} is no evaluation: it has no {lacks}; {remedy}")
        test = read_predictions(path / TEST)
        metrics, own = _read_metrics(path, test), path / VALIDATE
        validate = validate or (own if own.is_file() else None)
    elif path.is_file():
        test, metrics = read_predictions(path), {}
    else:
        raise UserError(f"{path} does not exist; {remedy}")
    held_out, digest_of = None, metrics.get("checkpoint_sha256")
    if validate is not None:
        held_out = read_predictions(validate)
        _check_validate(test, held_out)
        if held_out.path.parent.resolve() != test.path.parent.resolve():
            digest_of = _check_checkpoint(held_out.path, digest_of, path)
    return Evaluation(str(given), path, test, held_out, metrics, digest_of)


def _check_checkpoint(validate, digest_of, path):
    """The digest of the checkpoint that made the predictions `validate`, None where no metrics.json beside has it.

    UserError: another checkpoint's than `digest_of`, that of the evaluation `path`.
    """
    beside = validate.parent / "metrics.json"
    found = read_json(beside, METRICS_FILE).get("checkpoint_sha256") if beside.is_file() else None
    if found and digest_of and found != digest_of:
        raise UserError(
            f"--validate {validate} is of another checkpoint (sha256 {found[:12]}...) than {path} "
            f"({digest_of[:12]}...); give the validation predictions of the same one"
        )
    return found


def aligned(first, other):
    """`other` with its rows in the order of `first`.

    UserError: other images, labels or targets than the first, counted.
    """
    if set(first.label_names) != set(other.label_names):
        _check_labels(other.path, other.label_names, first.path, first.label_names)
    of_images = {first.row, other.row} == {"image"}
    shared = next((c for c in IMAGE_IDS if of_images and c in first.ids and c in other.ids), None)
    ours, theirs = (pd.Index(t.ids[shared] if shared else t.image_ids) for t in (first, other))
    missing, extra, rows = len(ours.difference(theirs)), len(theirs.difference(ours)), units(first.row)
    if first.row != other.row:
        raise UserError(
            f"{other.path} has a row per {other.row}, {first.path} per {first.row}; evaluate both by the same DATA.UNIT"
        )
    if missing or extra:
        raise UserError(
            f"{other.path} has other {rows} than {first.path}: {missing:,} missing, {extra:,} more; "
            f"only models tested on the same {rows} can be compared"
        )
    other = other.select(theirs.get_indexer(ours)).with_labels(first.label_names)
    unlike = ~((first.targets == other.targets) | (np.isnan(first.targets) & np.isnan(other.targets)))
    if unlike.any():
        raise UserError(
            f"{other.path} has {int(unlike.sum()):,} other targets than {first.path}, of {int(unlike.any(1).sum()):,} "
            f"{rows}; evaluate both with the same DATA.UNCERTAIN, DATA.MISSING and DATA.TEST_LABELER"
        )
    if "subject_id" in first.ids and "subject_id" in other.ids:
        moved = (first.ids["subject_id"].to_numpy() != other.ids["subject_id"].to_numpy()).sum()
        if moved:
            raise UserError(f"{other.path} names another patient than {first.path} for {moved:,} {rows}")
    return other


# -------------------------------------------------------------------------------------- ensembles
NO_MATTER = ("DATA.DATA_PATH", "DATA.IMAGES", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "DATA.IMG_ON_MEMORY",
             "DATA.ZIP_MODE", "MODEL.NAME", "MODEL.RESUME", "TRAIN.AUTO_RESUME")  # fmt: skip


def learned_by(config, prefix=""):
    """The config's keys that a run's weights depend on, but for the seed: dotted key -> value."""
    for key, value in config.items():
        if prefix or key in ("DATA", "MODEL", "TRAIN", "AUG"):
            if isinstance(value, dict):
                yield from learned_by(value, f"{prefix}{key}.")
            elif prefix + key == "DATA.SOURCES":  # the keys of a source are those of DATA in small letters, and path
                without = ("DATA.PATH", *NO_MATTER)
                yield prefix + key, [{k: v for k, v in s.items() if f"DATA.{k.upper()}" not in without} for s in value]
            elif prefix + key not in NO_MATTER:
                yield prefix + key, value


def check_apart(option, evaluations):
    """UserError where two of the evaluations are one: the same file, or every probability is equal."""
    for k, other in enumerate(evaluations):
        for one in evaluations[:k]:
            same = one.test.path.resolve() == other.test.path.resolve()
            if not same and set(one.test.label_names) == set(other.test.label_names):
                table = aligned(one.test, other.test)
                pairs = [(one.test.probabilities, table.probabilities), (one.test.logits, table.logits)]
                same = all(np.array_equal(a, b) for a, b in pairs if a is not None and b is not None)
            if same:
                raise UserError(
                    f"{option}: {other.given} is the same evaluation as {one.given} (every probability is equal); "
                    "leave one of them out"
                )


def check_one_configuration(first, others):
    """UserError, naming the keys, where runs differ in more than their seed, or are not known to be of one.

    A key that one run lacks, since it is newer than the run, has its default there.
    """
    ours = dict(learned_by(first.config))
    digests = {first.metrics.get("checkpoint_sha256"): first.path}
    for other in others:
        theirs = dict(learned_by(other.config))
        if bool(ours) != bool(theirs):
            bare = first if theirs else other
            raise UserError(
                f"--seeds-of: {bare.path} does not record its configuration, so it cannot be known to be another seed "
                "of the same one; give the folder that main.py --eval wrote"
            )
        digest_of = other.metrics.get("checkpoint_sha256")
        if digest_of and digest_of in digests:
            raise UserError(
                f"--seeds-of: {other.path} is of the same checkpoint as {digests[digest_of]} (sha256 "
                f"{digest_of[:12]}...); give an evaluation of a run with another SEED"
            )
        digests[digest_of] = other.path
        defaults = {key: knob.default if knob.xrays is None else knob.xrays for key, knob in KNOBS.items()}
        ours_now, theirs = defaults | ours, defaults | theirs
        unlike = [key for key in sorted({*ours_now, *theirs}) if ours_now.get(key) != theirs.get(key)]
        if unlike:
            raise UserError(
                f"--seeds-of: {other.path} is no other seed of {first.path}: {', '.join(unlike[:5])}"
                f"{', ...' if len(unlike) > 5 else ''} differ; compare configurations with --against"
            )


def _scores(predictions):
    """What metrics.json has of probabilities: the loss and every metric."""
    y, p = predictions.targets, np.clip(predictions.probabilities, 1e-12, 1 - 1e-12)
    loss = float(-np.nanmean(y * np.log(p) + (1 - y) * np.log1p(-p)))
    return {"loss": loss} | label_metrics(predictions.probabilities, y, predictions.label_names, predictions.logits)


def ensemble(evaluations, folder):
    """Average the probabilities of several evaluations of the same images into an evaluation of its own.

    Returns:
        The :class:`Evaluation` written to `folder`; with validation predictions where all of them have some.
    """
    first = evaluations[0]

    def averaged(tables):
        tables = [tables[0], *(aligned(tables[0], t) for t in tables[1:])]
        logits = None
        if all(t.logits is not None for t in tables):
            rows = np.tile(np.arange(len(tables[0])), len(tables))
            logits = logit_of_mean(np.concatenate([t.logits for t in tables]), rows)
        return replace(tables[0], probabilities=np.mean([t.probabilities for t in tables], axis=0), logits=logits)

    tables = {TEST: averaged([e.test for e in evaluations])}
    if all(e.validate is not None for e in evaluations):
        tables[VALIDATE] = averaged([e.validate for e in evaluations])
    keys = ("dataset", "root", "label_groups", "label_mapping", "label_policy", "primary_metric", "domain", "cohort")
    data, test = first.config.get("DATA"), tables[TEST]
    metrics = {
        "ensemble": [e.given for e in evaluations],
        "checkpoints": [e.metrics.get("checkpoint") for e in evaluations],
        "checkpoints_sha256": [e.metrics.get("checkpoint_sha256") for e in evaluations],
        "images": len(test),
        **_scores(test),
        **{key: first.metrics[key] for key in keys if key in first.metrics},
        **({"config": {"DATA": data}} if data else {}),
    }
    output_folder(folder, "--output")
    for name, t in tables.items():
        write_predictions(folder / name, t.ids, t.label_names, t.targets, t.probabilities, t.labels, t.logits)
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")  # last, as above
    return read_evaluation(folder)
