"""Why a model says so: Grad-CAM, and the places that DCNv3 samples; and their picture over the X-ray."""

import functools

import matplotlib

matplotlib.use("Agg")  # compute nodes have no display
import numpy as np
import torch
from matplotlib import colors
from matplotlib import pyplot as plt
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from dcnv3 import DCNv3
from dcnv3.definition import kernel_points


def check(model, size, name):
    """Raise a UserError unless the model has features with places, at images of this side."""
    if not hasattr(model, "feature_maps") or not hasattr(model, "classify"):
        raise UserError(f"--explain: the model of {name} has no features with places (feature_maps, classify)")
    with torch.no_grad():
        model.feature_maps(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))


def _maps(model, features, labels):
    """Grad-CAM by label, each [N, h, w] and a function of `features`; the weights of the channels are constants."""
    logits = model.classify(features)
    for label in labels:
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), features, retain_graph=True)
        yield (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()


def grad_cam(model, images, labels):
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) at the model's last features with places.

    images: [N, 3, S, S], normalised. labels: indices of the K labels asked for.

    Returns:
        [N, K, h, w], at least 0: where linear pooling follows (InternImage T to XL), what each place adds to the
        logit. Nothing is normalised, so maps of different images compare.
    """
    with torch.no_grad():
        features = model.feature_maps(images)
    return torch.stack(list(_maps(model, features.detach().requires_grad_(), labels)), 1).detach()


def full_resolution(model, images, labels):
    """Grad-CAM over the pixels that it is made of: [N, K, S, S], of the same mean as :func:`grad_cam`, so in its unit.

    The features of a place are not made of what lies under it: DCNv3 samples where its offsets say, and a network is
    free to write down at one place what it has seen at another, some places away. So a map is not stretched over the
    image but traced back: a pixel counts by how much the places of the map depend on it, each weighted by its own
    value (the size of the gradient of half the map's sum of squares; for one place, its effective receptive field,
    Luo et al. 2016), smoothed over half the distance of two places. It costs a backward pass a label.
    """
    images = images.detach().requires_grad_()
    found = []
    for cam in _maps(model, model.feature_maps(images), labels):
        (gradient,) = torch.autograd.grad((cam * cam).sum() / 2, images, retain_graph=True)
        fine = _smooth(gradient.abs().sum(1), images.shape[-1] / cam.shape[-1] / 2)
        least = torch.finfo(fine.dtype).tiny  # a map of zeros stays one
        found.append(fine * (cam.detach().mean((1, 2)) / fine.mean((1, 2)).clamp(min=least))[:, None, None])
    return torch.stack(found, 1)


def _smooth(maps, sigma):
    """Maps [N, H, W] smoothed by a Gaussian, in pixels; beyond the border is nothing."""
    radius = round(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=maps.device) / sigma) ** 2)
    weights = (weights / weights.sum()).to(maps.dtype)
    rows = F.conv2d(maps[:, None], weights[None, None, None], padding=(0, radius))
    return F.conv2d(rows, weights[None, None, :, None], padding=(radius, 0))[:, 0]


@functools.lru_cache(maxsize=1)  # asked for with every image
@torch.no_grad()
def first_places(model, size):
    """Where the first place of each resolution lies in the image: {places in a row: its x (= y) as a part of the side}.

    Place k of n lies at that x + k / n, which is not always the middle of the k-th of n squares: a padded 3 x 3
    convolution of stride 2 looks around its first pixel, so the places of InternImage or of a ResNet lie nearly half a
    square further left and up than those of ConvNeXt or Swin, which cut squares. Found from the kernels, strides and
    paddings (Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks"); where no convolution
    or pooling shrinks, squares are cut.
    """
    steps = {}  # places in a row before a layer -> (after it, by how many of those before the first one moves)

    def note(layer, inputs, output):
        kernel, stride, padding = (v[-1] if isinstance(v, tuple) else v for v in map(layer.__getattribute__, shape))
        before, after = inputs[0].shape[-1], output.shape[-1]
        if stride > 1 and after > steps.get(before, (0, 0))[0]:  # beside the main path layers may shrink more
            steps[before] = (after, (kernel - 1) / 2 - padding)

    shape = ("kernel_size", "stride", "padding")
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        features = model.feature_maps(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    last = features.shape[-1]
    found, now, x = {}, size, 0.5
    for before, (after, shift) in [*sorted(steps.items(), reverse=True), (last, (last, 0))]:
        x += (now / before - 1) / 2 * size / now
        found[before] = x / size
        x += shift * size / before
        now = after
        found[now] = x / size
    return found


@torch.no_grad()
def sampling_points(model, images, places):
    """Where the last DCNv3 layer of each resolution looks, seen from one place of each image.

    images: [N, 3, S, S], normalised. places: [N, 2], x and y as parts of the side.

    Returns:
        a list, from the finest resolution on, of (points [N, G * P, 2] as parts of the side, which may lie beyond the
        border, where the operator reads zeros; weights [N, G * P], whose sum over all groups is 1). Empty for a model
        without DCNv3.
    """
    layers = [module for module in model.modules() if isinstance(module, DCNv3)]
    if not layers:
        return []
    found = {}  # (h, w) -> last layer of that resolution, and what its offsets and weights are made of

    def keep(layer):
        return lambda _module, _inputs, features: found.update({tuple(features.shape[1:3]): (layer, features)})

    hooks = [m.dw_conv.register_forward_hook(keep(m)) for m in layers]
    try:
        model.feature_maps(images)
    finally:
        for hook in hooks:
            hook.remove()
    first, levels = first_places(model, images.shape[-1]), []
    for (height, width), (layer, features) in sorted(found.items(), reverse=True):
        size = torch.tensor([width, height])
        cell = (
            ((places.cpu() - first[width]) * size)
            .round()
            .long()
            .clamp(min=torch.zeros(2, dtype=torch.long), max=size - 1)
        )  # x, y
        features = features[torch.arange(len(cell)), cell[:, 1], cell[:, 0]]  # [N, C]
        shape = (len(cell), layer.group, layer.points)
        offset = layer.offset(features).float().cpu().view(*shape, 2)
        weights = layer.mask(features).float().cpu().view(shape).softmax(-1) / layer.group
        grid = torch.tensor(kernel_points((layer.kernel_size,) * 2, layer.remove_center)) - layer.kernel_size // 2
        pixels = cell.view(-1, 1, 1, 2) + (grid + offset) * layer.offset_scale
        levels.append(((first[width] + pixels / size).flatten(1, 2).numpy(), weights.flatten(1).numpy()))
    return levels


def maximum(cam, first=None):
    """Where a map [h, w] is largest: (x, y) as parts of the sides. first: of :func:`first_places`; pixels without."""
    row, column = np.unravel_index(np.argmax(cam), cam.shape)
    first = 0.5 / cam.shape[0] if first is None else first
    return first + column / cam.shape[1], first + row / cam.shape[0]


COLOURS = ("#4cc9f0", "#80ed99", "#ffd166", "#ef476f")  # of the levels, from the finest on


def draw_overlay(path, grey, extent, fine, place, levels, title):
    """Grad-CAM over the X-ray with its scale; beside it, if there are any, the sampling points of one place.

    Args:
        grey: the X-ray, uint8 [H, W].
        extent: left, top, right, bottom of what the model sees of it, in its pixels.
        fine: of :func:`full_resolution`, [S, S].
        place: of the last level that adds most, (x, y) as parts of the sides.
        levels: (points [M, 2], weights [M]) by level, of :func:`sampling_points` from there; empty without DCNv3. Not
            drawn for a map of zeros, in which no place adds anything.
    """
    levels = levels if fine.any() else []
    left, top, right, bottom = extent
    height, width = grey.shape
    panel, parts = 4.6, 2 if levels else 1
    size = (parts * panel * width / height + 1.5, panel + 1.0)
    figure, axes = plt.subplots(1, parts, figsize=size, layout="constrained", facecolor="white", squeeze=False)
    axes = axes[0]
    for axis in axes:
        axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
    figure.suptitle(title, fontsize=12, parse_math=False)

    highest = float(fine.max()) or 1.0
    scale = colors.Normalize(0, highest)
    axes[0].imshow(
        fine, cmap="inferno", norm=scale, alpha=0.55 * np.sqrt(fine / highest), extent=(left, right, bottom, top)
    )
    axes[0].set_title("Grad-CAM" if fine.any() else "Grad-CAM: no place adds to the logit", fontsize=10)
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(scale, "inferno"), ax=axes[0], fraction=0.05, pad=0.02, aspect=30
    )
    bar.set_label("contribution to the logit, by place", fontsize=8)
    bar.ax.tick_params(labelsize=8)

    if levels:
        axes[1].set_title("where DCNv3 looks from the place that adds most", fontsize=10)
    for k, (points, weights) in reversed(list(enumerate(levels))):
        spots = np.array([left, top]) + points * [right - left, bottom - top]
        strength = weights / weights.max()
        axes[1].scatter(
            *spots.T, s=7 + 38 * strength, c=[colors.to_rgba(COLOURS[k % 4], 0.3 + 0.7 * a) for a in strength],
            edgecolors=[(0, 0, 0, 0.3 + 0.7 * a) for a in strength], linewidths=0.5, label=f"level {k + 1}",
        )  # fmt: skip
    for axis, (x, y) in zip(axes, (maximum(fine), place)):
        if fine.any():
            here = left + x * (right - left), top + y * (bottom - top)
            axis.plot(*here, "+", color="white", markersize=11, markeredgewidth=1.6)
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if levels:  # outside: sampling points may lie anywhere
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="outside lower right", ncols=len(levels), fontsize=8, frameon=False
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)
