"""Why a model says so: Grad-CAM, and the places that DCNv3 samples; and their picture over the X-ray."""

import matplotlib

matplotlib.use("Agg")  # compute nodes have no display
import numpy as np
import torch
from matplotlib import colors
from matplotlib import pyplot as plt

from dcnv3 import DCNv3
from dcnv3.definition import kernel_points
from errors import UserError


def check(model, size, name):
    """Raise a UserError unless the model has features with places, at images of this side."""
    if not hasattr(model, "feature_maps") or not hasattr(model, "classify"):
        raise UserError(f"--explain: the model of {name} has no features with places (feature_maps, classify)")
    with torch.no_grad():
        model.feature_maps(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))


def grad_cam(model, images, labels):
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) at the model's last features with places, [N, F, h, w].

    images: [N, 3, S, S], normalised. labels: indices of the K labels asked for.

    Returns:
        [N, K, h, w], at least 0: where linear pooling follows (InternImage T to XL), what each place adds to the
        logit. Nothing is normalised, so maps of different images compare.
    """
    with torch.no_grad():
        features = model.feature_maps(images)
    features = features.detach().requires_grad_()
    logits = model.classify(features)
    maps = []
    for label in labels:
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), features, retain_graph=True)
        maps.append((gradient.mean((2, 3), keepdim=True) * features).sum(1).relu())
    return torch.stack(maps, 1).detach()


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
    levels = []
    for (height, width), (layer, features) in sorted(found.items(), reverse=True):
        size = torch.tensor([width, height])
        cell = (places.cpu() * size).long().clamp(min=torch.zeros(2, dtype=torch.long), max=size - 1)  # x, y
        features = features[torch.arange(len(cell)), cell[:, 1], cell[:, 0]]  # [N, C]
        shape = (len(cell), layer.group, layer.points)
        offset = layer.offset(features).float().cpu().view(*shape, 2)
        weights = layer.mask(features).float().cpu().view(shape).softmax(-1) / layer.group
        grid = torch.tensor(kernel_points((layer.kernel_size,) * 2, layer.remove_center)) - layer.kernel_size // 2
        pixels = cell.view(-1, 1, 1, 2) + (grid + offset) * layer.offset_scale
        levels.append((((pixels + 0.5) / size).flatten(1, 2).numpy(), weights.flatten(1).numpy()))
    return levels


def maximum(cam):
    """Middle of the largest cell of a map [h, w]: (x, y) as parts of the side."""
    row, column = np.unravel_index(np.argmax(cam), cam.shape)
    return (column + 0.5) / cam.shape[1], (row + 0.5) / cam.shape[0]


COLOURS = ("#4cc9f0", "#80ed99", "#ffd166", "#ef476f")  # of the levels, from the finest on


def draw_overlay(path, grey, extent, cam, levels, title):
    """Grad-CAM over the X-ray with its scale; beside it, if there are any, the sampling points seen from its maximum.

    Args:
        grey: the X-ray, uint8 [H, W].
        extent: left, top, right, bottom of what the model sees of it, in its pixels.
        cam: of :func:`grad_cam`, [h, w].
        levels: (points [M, 2], weights [M]) by level, of :func:`sampling_points`; empty without DCNv3.
    """
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

    highest = float(cam.max()) or 1.0
    scale = colors.Normalize(0, highest)
    fine = torch.nn.functional.interpolate(
        torch.from_numpy(cam)[None, None], size=(256, 256), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    axes[0].imshow(
        fine, cmap="inferno", norm=scale, alpha=0.55 * np.sqrt(fine / highest), extent=(left, right, bottom, top)
    )
    x, y = maximum(cam)
    here = left + x * (right - left), top + y * (bottom - top)
    shape = f"{cam.shape[1]} x {cam.shape[0]}"
    axes[0].set_title(f"Grad-CAM ({shape} places)", fontsize=10)
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(scale, "inferno"), ax=axes[0], fraction=0.05, pad=0.02, aspect=30
    )
    bar.set_label("contribution to the logit, by place", fontsize=8)
    bar.ax.tick_params(labelsize=8)

    if levels:
        axes[1].set_title("where DCNv3 looks from its maximum", fontsize=10)
    for k, (points, weights) in reversed(list(enumerate(levels))):
        spots = np.array([left, top]) + points * [right - left, bottom - top]
        strength = weights / weights.max()
        axes[1].scatter(
            *spots.T, s=7 + 38 * strength, c=[colors.to_rgba(COLOURS[k % 4], 0.3 + 0.7 * a) for a in strength],
            edgecolors=[(0, 0, 0, 0.3 + 0.7 * a) for a in strength], linewidths=0.5, label=f"level {k + 1}",
        )  # fmt: skip
    for axis in axes:
        axis.plot(*here, "+", color="white", markersize=11, markeredgewidth=1.6)
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if levels:  # outside: sampling points may lie anywhere
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="outside lower right", ncols=len(levels), fontsize=8, frameon=False
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)
