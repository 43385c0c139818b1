"""Does Grad-CAM point at the sign? On drawn chests, whose signs have known places.

    python benchmarks/localisation.py CHECKPOINT [--images 100]

CHECKPOINT: of a model trained on the synthetic tree (`dataset/synthetic.py`). For each label frontal chests are drawn
with its sign and two others, and once more without its sign: the sign is where the two pictures differ. A map hits
where its largest cell touches the sign. Beside the model: the same network untrained, the label's own mean map, and a
Gaussian in the middle (always the middle cell). Then the weights are drawn anew from the head downwards, and the maps
compared with those of before by Spearman's correlation.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr

import explain
import trained
from dataset.synthetic_drawing import SIGNS, draw
from models import build_model


def drawings(label, count, seed=987):
    """Pictures with the sign of `label` and two others, and where it is: uint8 [N] of [H, W], bool [N] of [H, W]."""
    for k in range(count):
        others = np.random.default_rng([seed, k]).choice([name for name in SIGNS if name != label], 2, replace=False)
        pictures = [
            draw({*others, *extra}, "PA", np.random.default_rng([seed, k, list(SIGNS).index(label)]))
            for extra in ([label], [])
        ]
        yield (pictures[0] * 255).astype(np.uint8), np.abs(pictures[0] - pictures[1]) > 0.04


def touches(mask, cell, grid):
    """Whether the sign lies in a cell (row, column) of a grid (rows, columns) over the picture."""
    edges = [[k * size // n for k in (c, c + 1)] for c, n, size in zip(cell, grid, mask.shape)]
    return mask[slice(*edges[0]), slice(*edges[1])].mean() > 0.02


def beside(mask, cell, grid):
    """Whether it lies in that cell or one of its neighbours."""
    around = np.ndindex(3, 3)
    cells = [(cell[0] + i - 1, cell[1] + j - 1) for i, j in around]
    return any(touches(mask, c, grid) for c in cells if all(0 <= k < n for k, n in zip(c, grid)))


def shares(hits, masks, choices, grid):
    """Of the masks [N]: the share whose sign `hits` the chosen cell, for each list of `choices`, and for all cells."""
    chosen = [np.mean([hits(m, c, grid) for m, c in zip(masks, cells)]) for cells in choices]
    return [*chosen, np.mean([[hits(m, cell, grid) for cell in np.ndindex(grid)] for m in masks])]


def largest(cam):
    return np.unravel_index(np.argmax(cam), cam.shape)


def maps_of(model, batch, label):
    return explain.grad_cam(model, batch, [label])[:, 0].numpy()


def randomised(model, config):
    """(what was drawn anew, the model), from the head downwards."""
    fresh = build_model(config)
    state, new = {k: v.clone() for k, v in model.state_dict().items()}, fresh.state_dict()
    for part in ("head.", "conv_head.", "levels.3.", "levels.2.", "levels.1.", "levels.0."):
        state |= {k: new[k] for k in new if k.startswith(part)}
        copy = build_model(config).eval()
        copy.load_state_dict(state)
        yield part.rstrip("."), copy


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=100, help="a label")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = trained.load(args.checkpoint)
    read, untrained = model.reader(), build_model(model.config).eval()
    rows, near, kept = [], [], {}
    for name in (name for name in SIGNS if name in model.label_names):
        label = model.label_names.index(name)
        pictures, masks = zip(*drawings(name, args.images))
        batch = model.normalize(torch.stack([read.transform(Image.fromarray(p)) for p in pictures]))
        ours, before = maps_of(model.model, batch, label), maps_of(untrained, batch, label)
        grid = ours.shape[1:]
        mean = [largest(ours.mean(0))] * len(ours)
        middle = [(grid[0] // 2, grid[1] // 2)] * len(ours)
        choices = [[largest(m) for m in ours], [largest(m) for m in before], mean, middle]
        rows.append([name, *shares(touches, masks, choices, grid)])
        near.append(shares(beside, masks, choices, grid))
        kept[name] = batch[:20], label, ours[:20]
    rows.append(["mean", *np.mean([row[1:] for row in rows], 0)])
    rows.append(["mean, there or in a cell beside", *np.mean(near, 0)])
    print(f"share of {args.images} maps of {grid[0]} x {grid[1]} cells whose largest touches the sign\n")
    print("| label | trained | untrained | its mean map | centre | any cell |\n| --- | --- | --- | --- | --- | --- |")
    for name, *values in rows:
        print(f"| {name} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    print("\n| drawn anew, down to | correlation with the map of before |\n| --- | --- |")
    for part, copy in randomised(model.model, model.config):
        found = []
        for batch, label, ours in kept.values():
            for a, b in zip(ours, maps_of(copy, batch, label)):
                if a.std() > 0:
                    found.append(spearmanr(a.ravel(), b.ravel()).statistic if b.std() > 0 else 0.0)
        print(f"| {part} | {np.mean(found):.2f} |")


if __name__ == "__main__":
    main()
