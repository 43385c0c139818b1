"""Do Grad-CAM, and a label's attention, point at the sign? On drawn chests, whose signs have known places.

    python benchmarks/localisation.py CHECKPOINT [--images 100]

CHECKPOINT: of a model trained on the synthetic tree (`dataset/synthetic.py`). For each label frontal chests are drawn
with its sign and two others, and once more without its sign: the sign is where the two pictures differ. A map
(`explain.full_resolution`, by each of `explain.METHODS` that the model has) hits where its largest value lies on the
sign, or no further from it than the pointing game allows (15 of 224 pixels; Zhang et al. 2018). Beside them: the first
of these maps of the same network untrained, its mean (of all other pictures), the middle of the picture (where a
Gaussian is largest), and a point anywhere.

Most signs have a usual place in the chest, which a mean map knows as well as any pointer. So a window is cut from each
picture, as the crops of a training are: wherever the sign lies in it, the map has to follow. The means for whole
pictures are printed below. Then the weights are drawn anew from the head downwards: how often the maps of the first ten
windows still hit, and their Spearman's correlation with those of before, at full resolution and by places as Grad-CAM
has them.
"""

import argparse
import copy
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.stats import spearmanr

from dataset.synthetic.drawing import SIGNS, draw
from models import build_model
from predicting import explain, trained

TOLERANCE = 15 / 224  # of the side
WINDOW = 0.7  # its side, as a part of the picture's shorter one


def drawings(label, count, windows, seed=987):
    """Pictures with the sign of `label` and two others, and how far from it each pixel is, as a part of the side.

    Yields (uint8 [H, W], float [H, W]) `count` times. Signs that a picture barely shows are drawn again.
    windows: square ones anywhere in the pictures, of which each shows at least half of the sign.
    """
    for k in itertools.count():
        others = np.random.default_rng([seed, k]).choice([name for name in SIGNS if name != label], 2, replace=False)
        with_it, without = (
            draw({*others, *extra}, "PA", np.random.default_rng([seed, k, list(SIGNS).index(label)]))
            for extra in ([label], [])
        )
        sign = np.abs(with_it - without) > 0.04
        if sign.mean() > 0.001:
            seen = a_window(sign, np.random.default_rng([seed, k])) if windows else np.s_[:]
            picture, sign = with_it[seen], sign[seen]
            yield (picture * 255).astype(np.uint8), distance_transform_edt(~sign) / len(sign)
            count -= 1
        if not count:
            return


def a_window(sign, rng):
    """Slices of a random one with at least half of the sign: bool [H, W]."""
    side = round(WINDOW * min(sign.shape))
    while True:
        y, x = (rng.integers(0, length - side + 1) for length in sign.shape)
        seen = np.s_[y : y + side, x : x + side]
        if 2 * sign[seen].sum() >= sign.sum():
            return seen


def distances(points, fields):
    """How far from its sign each point (x, y, as parts of the sides) is: points [N, 2], fields of `drawings`."""
    found = []
    for (x, y), field in zip(points, fields, strict=True):
        height, width = field.shape
        found.append(field[min(int(y * height), height - 1), min(int(x * width), width - 1)])
    return np.array(found)


def maps_of(model, batch, label, function=explain.full_resolution, at_once=8, **method):
    return np.concatenate([function(model, part, [label], **method)[:, 0].numpy() for part in batch.split(at_once)])


def randomised(model, config):
    """(what was drawn anew, the model), from the head downwards."""
    fresh = build_model(config)
    state, new = {k: v.clone() for k, v in model.state_dict().items()}, fresh.state_dict()
    for part in ("label_attention.", "head.", "conv_head.", "levels.3.", "levels.2.", "levels.1.", "levels.0."):
        drawn = {k: new[k] for k in new if k.removeprefix("backbone.").startswith(part)}
        if not drawn:  # of another head
            continue
        state |= drawn
        other = copy.deepcopy(model)
        other.load_state_dict(state)
        yield part.rstrip("."), other


def correlation(before, after):
    """Mean of Spearman's over maps that have something to compare; 0 where nothing is left."""
    pairs = [(a.ravel(), b.ravel()) for x, y in zip(before, after) for a, b in zip(x, y) if a.std() > 0]
    return np.mean([spearmanr(a, b).statistic if b.std() > 0 else 0.0 for a, b in pairs])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=100, help="a label")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = trained.load(args.checkpoint)
    read, untrained = model.reader(), build_model(model.config).eval()
    names = [name for name in SIGNS if name in model.label_names]
    methods, rows, means, kept = explain.methods(model.model), [], [], []
    for windows, where in ((True, ""), (False, ", whole pictures")):
        away = []  # label, pointer: the distances
        for name in names:
            label = model.label_names.index(name)
            pictures, fields = zip(*drawings(name, args.images, windows))
            batch = model.normalize(torch.stack([read.transform(Image.fromarray(p)) for p in pictures]))
            by_method = [maps_of(model.model, batch, label, method=method) for method in methods]
            ours, before = by_method[0], maps_of(untrained, batch, label)
            pointers = (*by_method, before, (ours.sum(0) - ours) / max(len(ours) - 1, 1))
            points = [*([explain.maximum(m) for m in maps] for maps in pointers), [(0.5, 0.5)] * len(ours)]
            away.append([*(distances(p, fields) for p in points), np.concatenate([f.ravel() for f in fields])])
            print(f"{name}{where}: {(away[-1][0] <= 0).mean():.2f}", file=sys.stderr)
            if windows:
                rows.append([name, *((d <= 0).mean() for d in away[-1])])
                kept.append((batch[:10], label, fields[:10]))
        for limit, said in ((0, ""), (TOLERANCE, ", within 15 of 224 pixels")):
            means.append([f"mean{where}{said}", *np.mean([[(d <= limit).mean() for d in row] for row in away], 0)])
    side = batch.shape[-1]
    print(f"share of {args.images} maps of {side} x {side} pixels whose largest value lies on the sign\n")
    heads = ["label", *methods, "untrained", "its mean map", "centre", "anywhere"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, *values in rows + means:
        print(f"| {name} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    after_new_weights(model, kept)


def after_new_weights(model, kept):
    """Prints what is left of the maps: kept holds (batch, label, fields) of each label."""
    functions = explain.full_resolution, explain.position_maps

    def maps(network):
        return [[maps_of(network, *case[:2], function) for case in kept] for function in functions]

    before = None
    print("\n| drawn anew, down to | on the sign | correlation with the map of before | by places |")
    print("| --- | --- | --- | --- |")
    for part, network in [("nothing", model.model), *randomised(model.model, model.config)]:
        after = maps(network)
        before = before or after  # of the first, with all its weights
        hits = [distances(map(explain.maximum, found), fields) <= 0 for found, (*_, fields) in zip(after[0], kept)]
        values = np.mean(hits), *map(correlation, before, after)
        print(f"| {part} | " + " | ".join(f"{v:.2f}" for v in values) + " |", flush=True)


if __name__ == "__main__":
    main()
