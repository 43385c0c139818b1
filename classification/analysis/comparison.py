"""Several evaluations in one report: models on the same test images, a model on several test sets, or both.

Evaluations of the same images are models on one *test set*, and are compared in pairs; evaluations of other images are
other test sets, each with its own patients and intervals. `collect` makes one dictionary of every number,
report.json, from which all else is drawn:

    common_labels       labels that have an AUROC in every evaluation
    models              model -> {"given": its evaluations, "checkpoint", "checkpoint_sha256"}
    sets                test set -> {"dataset", "first", "label_names", "left_out_labels", "models", "differences"}
    sets[S].models[M]   "labels", "mean" (over the labels of S), "mean_common" (over common_labels), "about", "policy",
                        "bootstrap" as in the report of a single evaluation; "label_mapping", "cost"
    sets[S].differences[M]   M minus the first model of S, as "against" in the report of a single evaluation
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.evaluation import IMAGE_IDS, aligned, check_apart, learned_by
from analysis.results import LEVEL, Measured, about, adjust, difference, drawn_from
from analysis.text import short_names
from common.errors import UserError

COST = ("parameters", "gmacs", "images_per_s", "device")


# ---------------------------------------------------------------------------- what belongs together
def _dataset(evaluation):
    return evaluation.metrics.get("dataset") or evaluation.config.get("DATA", {}).get("DATASET")


def _same_images(a, b):
    """Whether two evaluations are of the same images.

    Images are identified by dicom_id or path; tables without either are of the same images if row for row they have
    the same targets.

    UserError: they share some of their images only.
    """
    column = next((c for c in IMAGE_IDS if c in a.test.ids and c in b.test.ids), None)
    if column is None:
        shared = [n for n in a.test.label_names if n in b.test.label_names]
        if any(c in e.test.ids for e in (a, b) for c in IMAGE_IDS) or len(a.test) != len(b.test) or not shared:
            return False
        y, z = (e.test.with_labels(shared).targets for e in (a, b))
        return bool(np.array_equal(y, z, equal_nan=True))
    ours, theirs = (pd.Index(e.test.ids[column]) for e in (a, b))
    both = len(ours.intersection(theirs))
    if both == 0 or both == len(ours) == len(theirs):
        return both > 0
    if _dataset(a) and _dataset(b) and _dataset(a) != _dataset(b):
        return False  # file names that two data sets happen to share
    raise UserError(
        f"{b.given} and {a.given} share {both:,} of their {len(theirs):,} and {len(ours):,} images: neither one test "
        "set nor two; evaluate both on the same split"
    )


def _test_sets(evaluations):
    """Numbers of the evaluations of one test set together: [[int]]."""
    sets = []
    for k, evaluation in enumerate(evaluations):
        found = [s for s in sets if _same_images(evaluations[s[0]], evaluation)]
        found[0].append(k) if found else sets.append([k])
    return sets


def _distinct_names(names, *more):
    """`names` [N]; those that occur twice are followed by the first of `more` that makes them unlike."""
    for extra in more:
        of_name = {n: [x for m, x in zip(names, extra) if m == n] for n in names}
        names = [f"{n} ({x})" if len(set(of_name[n])) > 1 else n for n, x in zip(names, extra)]
    return names


def _run_name(evaluation):
    """MODEL.NAME/TAG of a training run; of a table of predictions its file's name, or its folder's."""
    config = evaluation.config
    if name := "/".join(filter(None, [config.get("MODEL", {}).get("NAME"), config.get("TAG")])):
        return name
    plain = evaluation.path.is_file() and evaluation.name == "predictions"
    return evaluation.path.resolve().parent.name if plain else evaluation.name


def _name_models(evaluations, names):
    """The model of each evaluation, by name: `names`, or else the run's; one checkpoint is one model."""
    if names:
        return list(names)
    keys = [e.metrics.get("checkpoint_sha256") or str(e.metrics.get("checkpoints") or e.given) for e in evaluations]
    first = [evaluations[k] for k in sorted({keys.index(key) for key in keys})]
    names = short_names([_run_name(e) for e in first])
    titles = _distinct_names(names, _options([e.config for e in first]), *_evaluation_names(first))
    by_key = dict(zip(dict.fromkeys(keys), titles))
    return [by_key[key] for key in keys]


def _options(configs):
    """What differs between runs, in a few words each: "SEED 2", "BASE_LR 0.001, SEED 2"; equal texts where nothing."""
    own = [dict(learned_by(c)) | {key: c[key] for key in ("SEED",) if key in c} for c in configs]
    unlike = [k for k in dict.fromkeys(k for o in own for k in o) if len({str(o.get(k)) for o in own}) > 1]
    return [", ".join(f"{k.rsplit('.', 1)[-1]} {o[k]}" for k in unlike[:3] if k in o) for o in own]


def _evaluation_names(evaluations):
    return [e.name for e in evaluations], short_names([e.given for e in evaluations])


def _name_sets(firsts, given):
    """The name of each test set; given: --test-sets, those of the evaluations of each set, or None: the data sets."""
    if not given:
        return _distinct_names([_dataset(e) or _run_name(e) for e in firsts], *_evaluation_names(firsts))
    for names in given:
        if len(set(names)) > 1:
            raise UserError(f"--test-sets names the same images {' and '.join(dict.fromkeys(names))}; choose one name")
    names = [names[0] for names in given]
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(f"--test-sets calls different images {twice[0]}; give each test set a name of its own")
    return names


# --------------------------------------------------------------------------------------- checks
def _check_names(members, models):
    """No two of the evaluations [M] of one test set bear one name."""
    for k, e in enumerate(members):
        if models[k] in models[:k]:
            raise UserError(
                f"{e.given} and {members[models.index(models[k])].given} are both {models[k]} on the same images; "
                "give each a name of its own with --names, one for every evaluation"
            )


def _check_labels(tables, givens):
    """UserError where no label is known in all of them."""
    known = [[n for n, y in zip(t.label_names, t.targets.T) if not np.isnan(y).all()] for t in tables]
    if not set.intersection(*map(set, known)):
        listed = "; ".join(f"{given}: {', '.join(names) or 'none'}" for given, names in zip(givens, known))
        raise UserError(f"there is no label that every evaluation knows, so nothing to compare ({listed})")


# -------------------------------------------------------------------------------------- measured
def _tables(members):
    """Predictions of one test set's evaluations, with the labels that all have, in one order of rows."""
    shared = [n for n in members[0].test.label_names if all(n in e.test.label_names for e in members)]
    if not shared:
        _check_labels([e.test for e in members], [e.given for e in members])
    # The order, and the patients, of a table that knows its patients.
    base = next((e.test for e in members if e.test.unit == "patient"), members[0].test).with_labels(shared)
    return [replace(aligned(base, e.test.with_labels(shared)), ids=base.ids) for e in members]


def _one_set(members, models, tables, options):
    """(section of a test set, {model: :class:`Measured`})."""
    cluster, patients = tables[0].clusters
    weights = statistics.draw(patients, options.resamples, options.seed)
    measured = {m: Measured(t, cluster, weights) for m, t in zip(models, tables)}
    names = tables[0].label_names
    first = models[0]
    left_out = {m: [n for n in e.test.label_names if n not in names] for m, e in zip(models, members)}
    section = {
        "dataset": _dataset(members[0]),
        "images": len(tables[0]),
        "first": first,
        "label_names": list(names),
        "left_out_labels": {m: lacking for m, lacking in left_out.items() if lacking},
        "models": {
            m: {
                "about": about(e),
                "policy": e.policy,
                "bootstrap": drawn_from(t, patients, options),
                "cost": {
                    "backbone": e.metrics.get("backbone") or e.config.get("MODEL", {}).get("TYPE"),
                    **{key: e.metrics.get(key) for key in COST},
                },
                "label_mapping": {n: found for n, found in e.metrics.get("label_mapping", {}).items() if n in names},
                "mean": measured[m].mean(),
                "labels": measured[m].labels(),
            }
            for m, e, t in zip(models, members, tables)
        },
        "differences": {m: difference(measured[m], measured[first], first) for m in models[1:]},
    }
    adjust([found["mean"] for found in section["differences"].values()])  # over the models compared with the first
    return section, measured


def collect(evaluations, options, names=None, set_names=None):
    """The report of several :class:`Evaluation` as one dictionary, see the head of this module.

    names: the model of each; evaluations that share one are of one model. Without it what differs of the runs' names.
    set_names: the test set of each; without it the names of the data sets.

    UserError: an evaluation twice; test sets that overlap; the same images with other targets; no common label.
    """
    of_model, sets = _name_models(evaluations, names), _test_sets(evaluations)
    titles = _name_sets([evaluations[s[0]] for s in sets], set_names and [[set_names[k] for k in s] for s in sets])
    parts = [([evaluations[k] for k in s], [of_model[k] for k in s]) for s in sets]
    tables = [_tables(members) for members, _ in parts]
    for members, models in parts:
        check_apart("EVALUATION", members)
        _check_names(members, models)
    _check_labels([found[0] for found in tables], [members[0].given for members, _ in parts])
    done = [_one_set(members, models, found, options) for (members, models), found in zip(parts, tables)]
    defined = [[n for n, value in zip(m.names, m.auroc) if not np.isnan(value)] for _, ms in done for m in ms.values()]
    common = [n for n in defined[0] if all(n in found for found in defined)]
    for section, measured in done:
        for model, found in section["models"].items():
            found["mean_common"] = measured[model].mean(np.isin(section["label_names"], common))
    of = {m: [e for e, name in zip(evaluations, of_model) if name == m] for m in dict.fromkeys(of_model)}
    recorded = ("checkpoint", "checkpoint_sha256")
    return {
        "named": bool(names), "resamples": options.resamples, "seed": options.seed, "level": LEVEL,
        "common_labels": common,
        "models": {
            m: {"given": [e.given for e in es], **{key: es[0].metrics.get(key) for key in recorded}}
            for m, es in of.items()
        },
        "sets": dict(zip(titles, (section for section, _ in done))),
    }  # fmt: skip
