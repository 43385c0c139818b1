"""Pictures of a training run and of an evaluation."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # compute nodes have no display
import numpy as np
from matplotlib import pyplot as plt
from sklearn.metrics import roc_curve

from analysis.training_log import read_metrics


def plot_training(folder, score):
    """training.png from metrics.jsonl: losses, score and learning rate over the epochs."""
    epochs = read_metrics(Path(folder) / "metrics.jsonl")
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
