"""Overlays of a run of predict.py: of each image and label, a map (`explain.METHODS`) over the X-ray, on one scale."""

import itertools
import re
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # compute nodes have no display
import numpy as np
import torch
from matplotlib import colors
from matplotlib import pyplot as plt

from common.errors import UserError
from common.files import read_json
from dataset.files.images import decode
from dataset.preparing import placement
from predicting import explain

FADED = 0.3  # of the strength of a map, for a label that is called negative
LEVELS = ("finest", "fine", "coarse", "coarsest")
# Of explain.METHODS: the unit of a map.
UNITS = {"Grad-CAM": "contribution to the logit", "attention": "the label's attention, 1 in all"}
COLOURS = ("#4cc9f0", "#80ed99", "#ffd166", "#ef476f")  # of LEVELS


def draw_overlays(folder, model, items, rows, labels, *, cuts, calibrated, areas, points, no_ids):
    """Draw the overlays of all images; returns the largest value of their maps, which is the end of the scale.

    Args:
        model: a `trained.Trained`.
        items: of each row of the table what it is made of: (its images as `listing.Listed`, Studies of one).
        rows: of the table; None, or one with an error, gets no overlay.
        labels: indices of the labels.
        cuts: {label: threshold or None} on the scale of the table, {} without any; calibrated: what that scale is.
        areas: {label: AUROC of the test}, {} where it is not known.
        points: whether to draw where DCNv3 looked, too.
        no_ids: whether the names of the files leave out those of the images.

    UserError: the folder cannot be written.
    """
    names, files, read, highest = model.label_names, file_names(model.label_names), model.reader(), 0.0
    chosen = [(k, row) for k, row in enumerate(rows) if row is not None and not row["error"]]
    method, shown = explain.methods(model.model)[0], []  # (row, image, beginning of its files' names)
    path = Path(folder)
    try:
        # The scale is known when all maps are: meanwhile they are kept here, a byte a pixel.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".maps") as kept:
            for k, row in chosen:
                images, study = items(k)
                for j, (listed, (fine, levels)) in enumerate(zip(images, _explain(model, study, labels, points))):
                    peaks = np.maximum(fine.max((1, 2), keepdims=True), np.finfo(np.float32).tiny)
                    highest = max(highest, float(fine.max()))
                    arrays = {"fine": np.round(fine / peaks * 255).astype(np.uint8), "peaks": peaks}
                    arrays |= {f"{what}{k}": part for k, level in enumerate(levels) for what, part in zip("pw", level)}
                    np.savez_compressed(Path(kept) / f"{len(shown)}.npz", **arrays)
                    stem = re.sub(r"[^\w.-]+", "_", Path(listed.path).stem[:100]) + "_"
                    hidden = f"{j + 1}_" if len(images) > 1 else ""
                    shown.append((row, listed, f"{k + 1:06d}_{hidden if no_ids else stem}"))
            for number, (row, listed, stem) in enumerate(shown):
                with np.load(Path(kept) / f"{number}.npz") as arrays:
                    fine = arrays["fine"] * (arrays["peaks"] / 255)
                    levels = [(arrays[f"p{k}"], arrays[f"w{k}"]) for k in range((len(arrays) - 2) // 2)]
                gray = decode(listed.read(), listed.path, **{**read.decoding, "shrink_to": 1024})
                for k, label in enumerate(labels):
                    name = names[label]
                    value, cut = float(row[name]), cuts.get(name)
                    positive = value >= 0.5 if cut is None else str(row[f"{name}_positive"]) == "1"
                    path = Path(folder) / f"{stem}{files[label]}.png"
                    draw_overlay(
                        path, gray, placement(model.config, *gray.shape), fine[k],
                        title(name, value, cut, positive, calibrated, areas.get(name)), method=method, highest=highest,
                        faded=not positive, levels=[(where[k], weights[k]) for where, weights in levels],
                    )  # fmt: skip
    except OSError as error:
        raise UserError(f"--explain: {error.filename or path} cannot be written ({error.strerror})") from error
    return highest


def _explain(model, study, labels, points):
    """Of each image of a study (Studies of one, uint8) the maps [K, S, S] of the labels, and with `points` the levels
    of `explain.sampling_points`, seen from where each map is largest."""
    network = model.model
    images, *where = study.to(next(network.parameters()).device)
    images = model.normalize(images)
    for image, fine in zip(images, explain.full_resolution(network, images, labels, where).cpu().numpy()):
        marks = torch.tensor([explain.maximum(one) for one in fine])
        seen = image.expand(len(labels), -1, -1, -1)
        yield fine, explain.sampling_points(network, seen, marks) if points else []


def file_names(label_names):
    """The part of a file's name for each label; labels that differ only in what a name cannot hold get a number."""
    parts = {}  # in lower case: some file systems take A and a for one
    for name in label_names:
        slug = re.sub(r"[^\w.-]+", "_", name)
        tries = itertools.chain([slug], (f"{slug}_{k}" for k in itertools.count(2)))
        part = next(part for part in tries if part.lower() not in parts)
        parts[part.lower()] = part
    return list(parts.values())


def title(name, value, cut, positive, calibrated, area):
    """What stands above an overlay, two lines; value and cut: probability and threshold, on one scale."""
    called = "" if cut is None else f", threshold {cut:.3f}: {'positive' if positive else 'negative'}"
    facts = "calibrated" if calibrated else "not calibrated"
    facts += "" if cut is not None else ", no threshold given"
    facts += "" if area is None else f", AUROC in the test {area:.3f}"
    return f"{name}: probability {value:.3f}{called}\n{facts}"


def read_areas(evaluation, digest):
    """{label: AUROC} of an evaluation's test; {} without an evaluation, or where it is of another checkpoint."""
    path = Path(evaluation or "")
    path = (path if path.is_dir() else path.parent) / "metrics.json"
    if not evaluation or not path.is_file():
        return {}
    metrics = read_json(path, "the metrics.json of an evaluation")
    return metrics.get("auc") or {} if metrics.get("checkpoint_sha256") == digest else {}


def draw_overlay(path, gray, extent, fine, text, *, method="Grad-CAM", highest=None, faded=False, levels=()):
    """A map over the X-ray, with one mark where it is largest; beside it, if there are any, the sampling points.

    Args:
        gray: the X-ray, uint8 [H, W].
        extent: left, top, right, bottom of what the model sees of it, in its pixels.
        fine: of `explain.full_resolution`, [S, S].
        highest: the end of the scale; that of this map alone if None.
        faded: draw it weaker, for a label that is called negative.
        levels: (points [M, 2], weights [M]) of each level, of `explain.sampling_points` from the mark. Not drawn for a
            map of zeros, in which no position adds anything.
    """
    levels = levels if fine.any() else ()
    left, top, right, bottom = extent
    height, width = gray.shape
    panel, parts = 4.6, 2 if levels else 1
    size = (parts * panel * width / height + 1.5, panel + 1.2)
    figure, axes = plt.subplots(1, parts, figsize=size, layout="constrained", facecolor="white", squeeze=False)
    axes = axes[0]
    for axis in axes:
        axis.imshow(gray, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
    figure.suptitle(text, fontsize=10, parse_math=False)

    highest = highest or float(fine.max()) or 1.0
    scale = colors.Normalize(0, highest)
    strength = (FADED if faded else 1.0) * 0.6 * np.sqrt((fine / highest).clip(0, 1))
    axes[0].imshow(fine, cmap="inferno", norm=scale, alpha=strength, extent=(left, right, bottom, top))
    what = method if fine.any() else f"{method}: no position adds to the logit"
    axes[0].set_title(what + (" (negative: faded)" if faded else ""), fontsize=9)
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(scale, "inferno"), ax=axes[0], fraction=0.05, pad=0.02, aspect=30
    )
    bar.set_label(f"{UNITS[method]}, per position; one scale for this run", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if fine.any():
        x, y = explain.maximum(fine)
        mark = left + x * (right - left), top + y * (bottom - top)
        axes[0].plot(*mark, "+", color="white", markersize=11, markeredgewidth=1.6)

    if levels:
        axes[1].set_title("where the network looked, from coarse to fine", fontsize=9)
    for k, (points, weights) in reversed(list(enumerate(levels))):
        spots = np.array([left, top]) + points * [right - left, bottom - top]
        part = weights / weights.max()
        axes[1].scatter(
            *spots.T, s=7 + 38 * part, c=[colors.to_rgba(COLOURS[k % 4], 0.3 + 0.7 * a) for a in part],
            edgecolors=[(0, 0, 0, 0.3 + 0.7 * a) for a in part], linewidths=0.5, label=LEVELS[k % 4],
        )  # fmt: skip
    for axis in axes:
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if levels:  # outside: sampling points may be anywhere
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower right", ncols=len(levels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
