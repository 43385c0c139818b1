"""Does Grad-CAM point at the sign? On drawn chests, whose signs have known places.

    python benchmarks/localisation.py CHECKPOINT [--images 100]

CHECKPOINT: of a model trained on the synthetic tree (`dataset/synthetic.py`). For each label frontal chests are drawn
with its sign and two others, and once more without its sign: the sign is where the two pictures differ. A map hits
where its largest value at full resolution lies on the sign, or no further from it than the pointing game allows (15
of 224 pixels; Zhang et al. 2018). Beside the model: the same network untrained, the label's own mean map, the middle
of the picture (where a Gaussian is largest), and a point anywhere. Then the weights are drawn anew from the head
downwards, and the maps compared with those of before by Spearman's correlation.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.stats import spearmanr

import explain
import trained
from dataset.synthetic_drawing import SIGNS, draw
from models import build_model

TOLERANCE = 15 / 224  # of the side


def drawings(label, count, seed=987):
    """Pictures with the sign of `label` and two others, and how far from it each pixel is, as a part of the side.

    Yields (uint8 [H, W], float [H, W]) `count` times. Signs that a picture barely shows are drawn again.
    """
    for k in itertools.count():
        others = np.random.default_rng([seed, k]).choice([name for name in SIGNS if name != label], 2, replace=False)
        with_it, without = (
            draw({*others, *extra}, "PA", np.random.default_rng([seed, k, list(SIGNS).index(label)]))
            for extra in ([label], [])
        )
        sign = np.abs(with_it - without) > 0.04
        if sign.mean() > 0.001:
            yield (with_it * 255).astype(np.uint8), distance_transform_edt(~sign) / len(sign)
            count -= 1
        if not count:
            return


def distances(points, fields):
    """How far from its sign each point (x, y, as parts of the sides) is: points [N, 2], fields of `drawings`."""
    found = []
    for (x, y), field in zip(points, fields, strict=True):
        height, width = field.shape
        found.append(field[min(int(y * height), height - 1), min(int(x * width), width - 1)])
    return np.array(found)


def maps_of(model, batch, label, at_once=20):
    return np.concatenate([explain.grad_cam(model, part, [label])[:, 0].numpy() for part in batch.split(at_once)])


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
        pictures, fields = zip(*drawings(name, args.images))
        batch = model.normalize(torch.stack([read.transform(Image.fromarray(p)) for p in pictures]))
        ours, before = maps_of(model.model, batch, label), maps_of(untrained, batch, label)
        first = explain.first_places(model.model, batch.shape[-1])[ours.shape[-1]]
        points = [
            [explain.maximum(m, first) for m in ours],
            [explain.maximum(m, first) for m in before],
            [explain.maximum(ours.mean(0), first)] * len(ours),
            [(0.5, 0.5)] * len(ours),
        ]
        away = [*(distances(p, fields) for p in points), np.concatenate([f.ravel() for f in fields])]
        rows.append([name, *((d <= 0).mean() for d in away)])
        near.append([(d <= TOLERANCE).mean() for d in away])
        kept[name] = batch[:20], label, ours[:20]
        print(f"{name}: {rows[-1][1]:.2f}", file=sys.stderr)
    rows.append(["mean", *np.mean([row[1:] for row in rows], 0)])
    rows.append(["mean, within 15 of 224 pixels", *np.mean(near, 0)])
    shape = f"{ours.shape[2]} x {ours.shape[1]}"
    print(f"share of {args.images} maps of {shape} places whose largest value lies on the sign\n")
    print("| label | trained | untrained | its mean map | centre | anywhere |\n| --- | --- | --- | --- | --- | --- |")
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
