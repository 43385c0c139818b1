"""Predictions and logs -> tables and figures."""

import contextlib
import json
from datetime import datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # compute nodes have no display
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from sklearn.metrics import roc_curve

from errors import UserError
from utils_multilabel import undefined_note


def _read_metrics(path):
    """Epochs of metrics.jsonl; a line that an outage cut short is passed over."""
    epochs = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            epochs.append(json.loads(line))
    return epochs


def append_metrics(path, record):
    """Add an epoch's line to metrics.jsonl, in place of what an interrupted run wrote from it on."""
    lines = [json.dumps(e) for e in _read_metrics(path) if e["epoch"] < record["epoch"]]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    temporary.replace(path)


def epoch_lines(record, score):
    """An epoch for the log: one line, and the AUROC by label below it."""

    def number(value):
        return "-" if value is None else f"{value:.4f}"

    line = (
        f"epoch {record['epoch']} done in {record['seconds']} s ({record['images_per_s']} images/s): "
        f"train loss {record['train_loss']:.4f}, val loss {record['val_loss']:.4f}, {score} {number(record[score])} "
        f"(best {number(record[f'best_{score}'])})"
    )
    if record["skipped"]:
        line += f", {record['skipped']} images skipped"
    if "ema" in record:
        line += f", EMA {score} {number(record['ema'][score])} (best {number(record['ema']['best'])})"
    if "auc" in record:
        line += "\n" + "  ".join(f"{name} {number(value)}" for name, value in record["auc"].items())
        line += "".join("\n" + note for note in undefined_note(record["auc"]))
    return line


def _new_folder(parent, name):
    """A new folder; two evaluations within one second get two."""
    for suffix in ["", *(f"_{k}" for k in range(2, 100))]:
        with contextlib.suppress(FileExistsError):
            (parent / (name + suffix)).mkdir(parents=True)
            return parent / (name + suffix)
    raise UserError(f"{parent}: too many evaluations named {name}")


def new_evaluation(parent):
    """A new folder `evaluation_<timestamp>` in `parent`, made before the work whose results it takes."""
    try:
        return _new_folder(Path(parent), datetime.now().strftime("evaluation_%Y%m%d_%H%M%S"))
    except OSError as error:
        raise UserError(f"RESULTS {parent} cannot be written ({error.strerror}); choose another folder") from error


def write_evaluation(folder, metrics, dataset):
    """metrics.json, predictions.csv and roc.png.

    metrics: of a task's `test`; its arrays go to predictions.csv.
    """
    figures = {k: v for k, v in metrics.items() if not isinstance(v, np.ndarray)}
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    arrays = dataset.label_names, metrics["targets"], metrics["probabilities"]
    read = {name: np.asarray(column)[metrics["rows"]] for name, column in dataset.rows().items()}
    write_predictions(folder / "predictions.csv", read, *arrays)
    plot_evaluation(folder, metrics, *arrays)


def write_predictions(path, rows, label_names, targets, probabilities):
    """predictions.csv: identifiers, then `<label>_target` and `<label>_probability` of every label.

    rows: column name -> values [N]; targets, probabilities: [N, L]; unknown targets stay empty.
    """
    columns = dict(rows)
    for k, name in enumerate(label_names):
        columns[f"{name}_target"] = targets[:, k]
        columns[f"{name}_probability"] = probabilities[:, k]
    pd.DataFrame(columns).to_csv(path, index=False, float_format="%.8g")


def plot_training(folder, score):
    """training.png from metrics.jsonl: losses, score and learning rate over the epochs."""
    epochs = _read_metrics(Path(folder) / "metrics.jsonl")
    x = [e["epoch"] for e in epochs]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    axes[0].plot(x, [e["train_loss"] for e in epochs], label="train")
    axes[0].plot(x, [e["val_loss"] for e in epochs], label="validation")
    axes[0].set_title("loss")
    axes[1].plot(x, [e[score] for e in epochs], label="weights")
    if "ema" in epochs[-1]:
        axes[1].plot(x, [e["ema"][score] if "ema" in e else None for e in epochs], label="EMA")
    axes[1].set_title(f"validation {score}")
    axes[2].plot(x, [e["lr"] for e in epochs])
    axes[2].set_title("learning rate at the epoch's end")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[1].legend()
    figure.savefig(Path(folder) / "training.png", dpi=110)
    plt.close(figure)


def plot_evaluation(folder, metrics, label_names, targets, probabilities):
    """roc.png: ROC curves and AUROC by label; only for multi-label metrics."""
    if "auc" not in metrics:
        return
    defined = [n for n in label_names if metrics["auc"][n] is not None]
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colors = plt.get_cmap("tab20")(np.arange(len(label_names)) % 20)
    for k, name in enumerate(label_names):
        if name in defined:
            known = ~np.isnan(targets[:, k])
            x, y, _ = roc_curve(targets[known, k], probabilities[known, k])
            curves.plot(x, y, color=colors[k], lw=1.3)
    curves.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
    curves.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC, test split", aspect="equal")
    values = [metrics["auc"][n] or 0 for n in label_names]
    bars.barh(range(len(label_names)), values, color=colors)
    texts = [f"{n}  {'-' if metrics['auc'][n] is None else format(metrics['auc'][n], '.3f')}" for n in label_names]
    bars.set_yticks(range(len(label_names)), texts)
    bars.invert_yaxis()
    bars.axvline(0.5, color="grey", lw=0.8, ls="--")
    mean = metrics["mean_auc"]
    bars.set(xlim=(0, 1), title="AUROC by label" + ("" if mean is None else f", mean {mean:.3f}"))
    figure.savefig(Path(folder) / "roc.png", dpi=110)
    plt.close(figure)
