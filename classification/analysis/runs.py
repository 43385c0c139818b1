"""Every training run below a folder at a glance: report.py --runs OUTPUT.

Reads what a run leaves in its folder (config.json, metrics.jsonl, log_rank0.txt) and the evaluations of its
checkpoints (metrics.json and, for the interval, report.json); no checkpoint, no torch. Written to the folder:
runs.html, runs.csv, runs.png and runs.svg.
"""

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path

import numpy as np

from analysis import figures, page, tables
from analysis.evaluation import learned_by
from analysis.metrics import METRICS
from analysis.tables import DASH, Cell, count, figure, make, number, plain
from analysis.text import short_names
from analysis.training_log import chosen_by, read_metrics
from analysis.writing import write_files
from common.errors import UserError

FILES = {"config.json", "metrics.jsonl", "log_rank0.txt"}
RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) ", re.M)
TAIL = 1 << 20  # bytes of the log that are read
LOWER = {metric.key for metric in METRICS if not metric.higher_is_better}


# ------------------------------------------------------------------------------------------- read
def _read_json(path):
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def _records(path):
    """[(level, text)] of the end of a log."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        parts = RECORD.split(file.read().decode(errors="replace"))
        return list(zip(parts[1::2], (text.strip() for text in parts[2::2])))
    return []


def _is_held(folder):
    """Whether a process holds the run's lock, and so trains it now."""
    with contextlib.suppress(FileNotFoundError), open(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def _state(folder, records, last, done):
    """How a run ended, by the last record that says so; last: its last epoch; done: whether that is all."""
    if _is_held(folder):
        return "running"
    at = ""
    for level, text in reversed(records):
        if text.startswith(("finished", "already finished")):
            return "finished"
        if level == "ERROR" and not done:
            # After a traceback comes its explanation; an error of an evaluation comes after "finished".
            return f"failed: {text.splitlines()[-1].removeprefix('error: ')}"
        if found := re.match(r"stopped by (\w+)", text):
            at = f"stopped by {found[1]}"
        if found := re.match(r"epoch (\d+)(?:/\d+ update (\d+)/(\d+)| done)", text):
            where = f" in epoch {found[1]}, update {found[2]} of {found[3]}" if found[2] else f" after epoch {found[1]}"
            return (at or "cut off") + where
    return at or ("finished" if done else f"cut off after epoch {last}" if last else "cut off in its first epoch")


def _best(epochs, score, of):
    """(best value, its epoch) of a score; of: epoch -> the metrics of its weights, or None."""
    values = [(of(e)[score], e["epoch"]) for e in epochs if of(e) and of(e).get(score) is not None]
    if not values:
        return None, None
    sign = -1 if score in LOWER else 1
    return max(values, key=lambda pair: (sign * pair[0], -pair[1]))


def _read_run(folder, root):
    config, epochs = _read_json(folder / "config.json"), read_metrics(folder / "metrics.jsonl")
    score = chosen_by(epochs) if epochs else ""
    wanted, speeds = config.get("TRAIN", {}).get("EPOCHS"), [e["images_per_s"] for e in epochs if "images_per_s" in e]
    last = epochs[-1]["epoch"] if epochs else 0
    (best, best_epoch), (ema, ema_epoch) = (_best(epochs, score, of) for of in (dict, lambda e: e.get("ema")))
    return {
        "name": str(folder.relative_to(root)) if folder != root else folder.name, "folder": folder,
        "config": config, "options": dict(learned_by(config)), "seed": config.get("SEED"),
        "state": _state(folder, _records(folder / "log_rank0.txt"), last, bool(wanted) and last >= wanted),
        "epochs": epochs, "done": last, "wanted": wanted, "score": score,
        "best": best, "best_epoch": best_epoch, "ema": ema, "ema_epoch": ema_epoch,
        "images_per_s": float(np.median(speeds)) if speeds else None, "evaluations": [],
    }  # fmt: skip


def _is_run(folder, files):
    """A folder in which training began: one of an evaluation alone has a log only."""
    if files & {"config.json", "metrics.jsonl"}:
        return True
    records = _records(folder / "log_rank0.txt")
    return bool(records) and not any(text.startswith(("evaluating", "training step")) for _, text in records)


def _find_evaluations(root, runs):
    """Folders of evaluations: below `root`, and in RESULTS of the runs, relative to here or to a folder above root."""
    bases = [Path.cwd(), *root.resolve().parents[:3]]
    results = {r["config"].get("RESULTS") for r in runs} - {None, ""}
    folders = {(base / path).resolve() for path in results for base in bases}
    found = {p.parent for folder in folders if folder.is_dir() for p in folder.glob("*/metrics.json")}
    return sorted(found | {p.parent.resolve() for p in root.glob("**/evaluation_*/metrics.json")})


def _add_evaluations(runs, folders):
    """Each run's `evaluations`: {"data", "checkpoint", "folder", "value", "low", "high"}."""
    of = {r["folder"].resolve(): r for r in runs}
    for folder in folders:
        metrics = _read_json(folder / "metrics.json")
        if not isinstance(metrics.get("checkpoint"), str):
            continue
        path = Path(metrics["checkpoint"])
        run = of.get(path.parent.resolve()) or next(
            # the same run, elsewhere: a folder that was moved or copied
            (r for f, r in of.items() if not path.parent.exists() and f.parts[-2:] == path.parent.parts[-2:]),
            None,
        )
        if run is None:
            continue
        mean = _read_json(folder / "report.json").get("mean", {}).get("auroc") or {}
        score = run["score"] if run["score"] in metrics else "mean_auc"
        value = mean.get("value", metrics.get(score))
        found = {"data": metrics.get("dataset"), "checkpoint": path.stem, "folder": folder, "value": value}
        run["evaluations"].append(found | {"low": mean.get("low"), "high": mean.get("high")})


def read_runs(root):
    """Every run below `root`; those of one configuration together, the best configuration first.

    UserError: no run there.
    """
    root = Path(root).expanduser()
    found = []
    for folder, _, files in os.walk(root, followlinks=True):
        files = FILES & set(files)
        if files and "predictions.csv" not in os.listdir(folder) and _is_run(Path(folder), files):
            found.append(_read_run(Path(folder), root))
    if not found:
        raise UserError(
            f"--runs {root}: there is no run in or below it (a folder with config.json, metrics.jsonl or "
            "log_rank0.txt); give the OUTPUT of training"
        )
    _add_evaluations(found, _find_evaluations(root, found))
    of_group = {}
    for run in found:
        run["group"] = json.dumps(run["options"] or run["name"], sort_keys=True, default=str)
        of_group.setdefault(run["group"], []).append(_rank(run))
    return sorted(found, key=lambda r: (min(of_group[r["group"]]), r["group"], _rank(r), r["name"]))


def _rank(run):
    """Sorts the best first, runs without a score last."""
    return np.inf if run["best"] is None else run["best"] if run["score"] in LOWER else -run["best"]


def differing(runs):
    """{option: its value in each run} of the options that differ among the runs with a config; dotted keys."""
    options = [r["options"] | ({"SEED": r["seed"]} if r["seed"] is not None else {}) for r in runs]
    known = [o for o in options if o]
    keys = dict.fromkeys(key for o in known for key in o)
    unlike = [key for key in keys if len({json.dumps(o.get(key), default=str) for o in known}) > 1]
    return {key: [o.get(key) for o in options] for key in unlike}


# ----------------------------------------------------------------------------------------- tables
def _value(value):
    if value is None:
        return Cell(DASH)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return Cell(text or "(empty)", value if isinstance(value, int | float) else text)


def _tested(run):
    return "; ".join(f"{e['data']} {figure(e).text} ({e['checkpoint']})" for e in run["evaluations"]) or DASH


def _heads(keys):
    """Short names of options: the last part of the key, where that says which."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return [short if last.count(short) == 1 else key for key, short in zip(keys, last)]


def _all_runs(runs, unlike):
    scores = {r["score"] for r in runs} - {""}
    rows = []
    for k, (r, name) in enumerate(zip(runs, short_names([r["name"] for r in runs]))):
        of = f"{r['done']} of {r['wanted']}" if r["wanted"] else f"{r['done']}"
        epoch, ema = (f" (epoch {e})" if e else "" for e in (r["best_epoch"], r["ema_epoch"]))
        by = f"{r['score']} " if len(scores) > 1 else ""
        rows.append([
            Cell(name, name), *(_value(values[k]) for values in unlike.values()),
            Cell(by + number(r["best"], 4) + epoch, r["best"]), Cell(number(r["ema"], 4) + ema, r["ema"]),
            Cell(of, r["done"]), plain(r["images_per_s"], 1), Cell(r["state"], r["state"], wide=True),
            Cell(_tested(r), max((e["value"] or 0 for e in r["evaluations"]), default=None), wide=True),
        ])  # fmt: skip
    best = f"best {scores.pop()}" if len(scores) == 1 else "best score"
    return make("runs", "", rows, more=[*_heads(unlike), best])


def _configurations(runs, unlike):
    """Seeds of one configuration together; None where each configuration has but one run."""
    groups, keys = {}, [key for key in unlike if key != "SEED"]
    for k, run in enumerate(runs):
        groups.setdefault(run["group"], []).append(k)
    if len(groups) == len(runs):
        return None

    def spread(values):
        values = [v for v in values if v is not None]
        mean, sd = (np.mean(values) if values else None), (np.std(values, ddof=1) if len(values) > 1 else None)
        return [count(len(values)), plain(mean, 4), plain(sd, 4)]

    rows = []
    names = short_names([r["name"] for r in runs])
    for members in groups.values():
        tests = [[e["value"] for e in runs[k]["evaluations"]][-1:] for k in members]
        rows.append([
            Cell(", ".join(names[k] for k in members), wide=True), *(_value(unlike[key][members[0]]) for key in keys),
            *spread([runs[k]["best"] for k in members]), *spread([v for found in tests for v in found]),
        ])  # fmt: skip
    return make("configurations", "", rows, more=_heads(keys))


def _states(runs):
    kinds = [r["state"].split()[0].strip(":") for r in runs]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))


def _csv_rows(runs, unlike):
    scores = ["score", "best", "best_epoch", "ema", "ema_epoch", "images_per_s"]
    tests = ["test_data", "test_checkpoint", "test_value", "test_low", "test_high", "test_folder"]
    yield ["run", "state", "epochs", "epochs_wanted", *scores, *unlike, *tests]
    for k, r in enumerate(runs):
        own = [r["name"], r["state"], r["done"], r["wanted"], *(r[c] for c in scores)]
        own += [json.dumps(v[k]) if isinstance(v[k], dict | list) else v[k] for v in unlike.values()]
        for e in r["evaluations"] or [{}]:
            yield [*own, *(e.get(c) for c in ("data", "checkpoint", "value", "low", "high", "folder"))]


def write_runs(root, folder=None):
    """The files at the head of this module, to `folder` (default `root`); returns (folder, text for the terminal)."""
    runs = read_runs(root)
    unlike, folder = differing(runs), Path(folder or root).expanduser()
    shown = [t for t in (_all_runs(runs, unlike), _configurations(runs, unlike)) if t]
    names, texts = short_names([r["name"] for r in runs]), {}

    def draw(folder):
        figures.write_runs([(name, r["group"], r["epochs"], r["score"]) for name, r in zip(names, runs)], folder)
        title = f"{len(runs):,} runs below {root}"
        texts["runs.html"] = page.render_runs(title, _states(runs), shown, folder / "runs.svg")

    write_files(folder, texts, "runs.csv", _csv_rows(runs, unlike), draw)
    return folder, "\n\n".join(tables.plain_text(t) for t in shown)
