"""Pictures for papers, as PNG and SVG, and the picture of a training run."""

import functools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # compute nodes have no display
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from analysis.comparison_tables import approximate
from analysis.metrics import METRICS
from analysis.tables import STAGES
from analysis.training_log import chosen_by, read_metrics

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
COLORS, MARKERS = (BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9", "#e69f00", "black"), "osD^vPX"
STYLE = {
    "font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8,
    "axes.titleweight": "bold", "axes.grid": True, "grid.alpha": 0.3, "svg.fonttype": "none", "svg.hashsalt": "report",
    "legend.frameon": False,
}  # fmt: skip


def _training(epochs, rows):
    """Loss, each metric of `rows` that the epochs have, and learning rate; the one that chooses the best is marked."""
    x, best_by = [e["epoch"] for e in epochs], chosen_by(epochs)
    rows = [metric for metric in rows if any(metric.key in e for e in epochs)]
    panels = 2 + len(rows)
    figure, axes = plt.subplots(1, panels, figsize=(3.2 * panels, 2.9), layout="constrained")
    axes[0].plot(x, [e["train_loss"] for e in epochs], color=BLUE, label="train")
    axes[0].plot(x, [e["val_loss"] for e in epochs], color=ORANGE, ls="--", label="validation")
    axes[0].set_title("loss")
    for axis, metric in zip(axes[1:], rows):
        axis.plot(x, [e.get(metric.key) for e in epochs], color=BLUE, label="weights")
        if any("ema" in e for e in epochs):
            axis.plot(x, [e.get("ema", {}).get(metric.key) for e in epochs], color=ORANGE, ls="--", label="EMA")
        best = ", chooses the best" if metric.key == best_by else ""
        axis.set_title(f"validation {metric.key}\n{metric.direction}{best}")
    axes[-1].plot(x, [e["lr"] for e in epochs], color=BLUE)
    axes[-1].set_title("learning rate at the epoch's end")
    axes[-1].yaxis.set_major_formatter("{x:g}")  # a power of ten above the axis would run into the title
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:-1]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)  # beside the data, not upon them
    return figure


def plot_training(folder, rows):
    """training.png from metrics.jsonl of a run: losses, metrics and learning rate over the epochs."""
    with plt.rc_context(STYLE):
        figure = _training(read_metrics(Path(folder) / "metrics.jsonl"), rows)
        figure.savefig(Path(folder) / "training.png", dpi=120)
    plt.close(figure)


def _panels(titles, x_label, y_label, side=1.75):
    """A figure with one square axis from 0 to 1 a title; the rest of the last row stays empty."""
    names = list(titles)
    columns = min(5, max(2, int(np.ceil(np.sqrt(len(names))))))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, side * rows + 0.2), layout="constrained",
                                sharex=True, sharey=True, squeeze=False)  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, title in zip(axes.flat, names):
        axis.set(title=title, xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    figure.supxlabel(x_label, fontsize=8)
    figure.supylabel(y_label, fontsize=8)
    return figure, axes


def _curves(report, key, x_label, y_label):
    found, grid = report["curves"]["labels"], report["curves"]["grid"]
    if not found:
        return None
    area = {"roc": "auroc", "precision_recall": "auprc"}[key]
    titles = (f"{name}\n{report['labels'][name][area]['value']:.3f}" for name in found)
    figure, axes = _panels(titles, x_label, y_label)
    for axis, (name, curves) in zip(axes.flat, found.items()):
        c = curves[key]
        axis.fill_between(grid, c["low"], c["high"], color=BLUE, alpha=0.2, lw=0)
        axis.plot(grid, c["value"], color=BLUE, lw=1.2)
        chance = [0, 1] if key == "roc" else [report["labels"][name]["prevalence"]] * 2
        axis.plot([0, 1], chance, color="grey", lw=0.7, ls="--")
    return figure


def _auroc(report):
    """Every label's AUROC with its interval, and their mean."""
    rows = [(n, found["auroc"]) for n, found in report["labels"].items() if found["auroc"]["value"] is not None]
    if not rows:
        return None
    rows.append(("mean", report["mean"]["auroc"]))
    figure, axis = plt.subplots(figsize=(5.2, 0.26 * len(rows) + 0.7), layout="constrained")
    for y, (name, a) in enumerate(rows):
        color, marker = (ORANGE, "D") if name == "mean" else (BLUE, "o")
        if a["low"] is not None:
            axis.plot([a["low"], a["high"]], [y, y], color=color, lw=1.8, solid_capstyle="butt")
        axis.plot(a["value"], y, marker, color=color, ms=4.5)
    axis.axvline(0.5, color="grey", lw=0.7, ls="--")
    axis.set_yticks(range(len(rows)), [f"{n}  {a['value']:.3f}" for n, a in rows])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    low = min([0.5, *(a["low"] if a["low"] is not None else a["value"] for _, a in rows)])
    axis.set(xlabel="AUROC, 95% interval", xlim=(max(0, low - 0.02), 1))
    return figure


def _calibration(report):
    stages = report["calibration"]
    curves = {
        n: [
            (color, style, stages[s]["labels"][n]["curve"], STAGES[s])
            for s, color, style in (("before", BLUE, "o-"), ("calibrated", ORANGE, "s--"))
            if "curve" in stages.get(s, {}).get("labels", {}).get(n, {})
        ]
        for n in report["label_names"]
    }  # fmt: skip
    curves = {n: c for n, c in curves.items() if c}
    if not curves:
        return None
    figure, axes = _panels(curves, "mean probability", "share of positives")
    for axis, lines in zip(axes.flat, curves.values()):
        axis.plot([0, 1], [0, 1], color="grey", lw=0.7, ls="--")
        for color, style, curve, stage in lines:
            axis.plot(curve["probability"], curve["rate"], style, color=color, ms=2.5, lw=1, label=stage)
            axis.vlines(curve["probability"], curve["low"], curve["high"], color=color, lw=0.6, alpha=0.6)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _cooccurrence(report):
    names, counts = report["cooccurrence"]["labels"], np.array(report["cooccurrence"]["counts"])
    side = 0.36 * len(names) + 1.6
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(counts, cmap="Blues")
    for (row, column), n in np.ndenumerate(counts):
        dark = n > 0.6 * counts.max()
        axis.text(column, row, n, ha="center", va="center", fontsize=6, color="white" if dark else "black")
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.grid(visible=False)
    return figure


def _written(draw):
    """Makes of `draw(data) -> {name: figure, None without data}` a function (data, folder) that writes <name>.png and
    <name>.svg."""

    @functools.wraps(draw)
    def write(data, folder):
        with plt.rc_context(STYLE):
            for name, figure in draw(data).items():
                for suffix in ("png", "svg"):
                    (folder / f"{name}.{suffix}").unlink(missing_ok=True)
                    if figure is not None:
                        metadata = {"Date": None} if suffix == "svg" else None  # the same numbers, the same file
                        figure.savefig(folder / f"{name}.{suffix}", dpi=150, metadata=metadata)
                if figure is not None:
                    plt.close(figure)

    return write


@_written
def write_figures(report):
    """Every figure of the report of one evaluation."""
    epochs = report["training"].get("epochs", [])
    return {
        "auroc": _auroc(report),
        "roc": _curves(report, "roc", "1 - specificity", "sensitivity"),
        "precision_recall": _curves(report, "precision_recall", "sensitivity", "precision"),
        "calibration": _calibration(report),
        "cooccurrence": _cooccurrence(report),
        "training": _training(epochs, METRICS) if epochs else None,
    }


@_written
def write_forest(panels):
    """AUROC with its interval by label, and the mean over the common labels; hollow where a label is approximate.

    panels: [(title, [(name, section of analysis.comparison)])]; in a panel every name has a colour and a marker.
    """
    labels = list(dict.fromkeys(n for _, series in panels for _, found in series for n in found["labels"]))
    most = max(len(series) for _, series in panels)
    height = (len(labels) + 1) * max(0.24, 0.11 * most + 0.08) + 1.0
    figure, axes = plt.subplots(1, len(panels), figsize=(1.6 + 3.8 * len(panels), height), layout="constrained",
                                sharex=True, sharey=True, squeeze=False)  # fmt: skip
    lowest, hollow = 0.5, False
    for axis, (title, series) in zip(axes.flat, panels):
        for k, (name, found) in enumerate(series):
            style = {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)], "ms": 4}
            rows = [found["labels"].get(n, {}).get("auroc") for n in labels] + [found["mean_common"]["auroc"]]
            shift = 0.7 * ((k + 0.5) / len(series) - 0.5)
            for y, (label, a) in enumerate(zip([*labels, ""], rows)):
                if a is None or a["value"] is None:
                    continue
                if a["low"] is not None:
                    axis.plot([a["low"], a["high"]], [y + shift] * 2, color=style["color"], lw=1.5)
                rough = label in approximate(found)
                axis.plot(a["value"], y + shift, **style, **({"mfc": "white"} if rough else {}))
                lowest, hollow = min(lowest, a["value"], a["low"] or a["value"]), hollow or rough
            axis.plot([], [], ls="", label=name, **style)
        axis.axvline(0.5, color="grey", lw=0.7, ls="--")
        axis.axhline(len(labels) - 0.5, color="grey", lw=0.7)
        axis.set_title(title)
        axis.grid(axis="y", visible=False)
        longest = max(len(name) for name, _ in series)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.6 / height), ncols=2 if longest < 28 else 1, fontsize=7)
    for axis in axes.flat:
        text = "AUROC, 95% interval" + "; hollow: approximate label" * hollow
        axis.set(xlabel=text, xlim=(max(0, lowest - 0.02), 1))
    axes[0, 0].set_yticks(range(len(labels) + 1), [*labels, "mean of the common"])
    axes[0, 0].set_ylim(len(labels) + 0.5, -0.5)
    return {"auroc": figure}


NAMED = 24  # runs in the legend


@_written
def write_runs(curves):
    """The score of every run over its epochs.

    curves: [(name, group, epochs of metrics.jsonl, score)]; runs of one group have one colour.
    """
    figure, axis = plt.subplots(figsize=(9.6, 4.2), layout="constrained")
    groups = list(dict.fromkeys(group for _, group, *_ in curves))
    for k, (name, group, epochs, score) in enumerate(curves):
        shown = [(e["epoch"], e[score]) for e in epochs if e.get(score) is not None]
        color, style = COLORS[groups.index(group) % len(COLORS)], ("-", "--", ":", "-.")[k % 4]
        axis.plot(*zip(*shown) if shown else ([], []), style, marker=".", ms=4, lw=1.2, color=color,
                  label=name if k < NAMED else None)  # fmt: skip
    scores = list(dict.fromkeys(score for *_, score in curves if score))
    axis.set(xlabel="epoch", ylabel=f"validation {' or '.join(scores)}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    rest = f"and {len(curves) - NAMED} more" if len(curves) > NAMED else None
    figure.legend(loc="outside right upper", fontsize=7, title=rest, title_fontsize=7)
    return {"runs": figure}
