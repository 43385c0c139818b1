"""What a prediction rests on: Grad-CAM or a label's attention, and the positions that DCNv3 samples."""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from dcnv3 import DCNv3
from dcnv3.definition import kernel_points


def check(model, size, name):
    """Raise a UserError unless the model has features with positions, at images of this side."""
    if not hasattr(model, "feature_maps") or not hasattr(model, "classify"):
        raise UserError(f"--explain: the model of {name} has no features with positions (feature_maps, classify)")
    with torch.no_grad():
        model.feature_maps(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))


def _grad_cams(model, features, labels, study=()):
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) by label; the weights of the channels are constants."""
    logits = model.classify(features, *study)
    for label in labels:
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), features, retain_graph=True)
        yield (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()


def _attentions(model, features, labels, study=()):
    """How much each of the labels attends to each position (MODEL.HEAD label_attention)."""
    maps = model.attention_maps(features, *study)
    yield from (maps[:, label] for label in labels)


# Name -> function (model, features [N, C, h, w], labels, view and rows of `common.studies.Studies`) -> of each label a
# map [N, h, w], at least 0, and a function of the features.
METHODS = {"attention": _attentions, "Grad-CAM": _grad_cams}


def methods(model):
    """Names of the METHODS that a model has; the first is what --explain shows."""
    return [name for name in METHODS if name != "attention" or hasattr(model, "attention_maps")]


def position_maps(model, images, labels, study=(), method=None):
    """Maps at the model's last features with positions, by a row of METHODS, the first that it has if None.

    images: [N, 3, S, S], normalised. labels: indices of the K labels asked for.

    Returns:
        [N, K, h, w], at least 0. Grad-CAM, where linear pooling follows (InternImage T to XL): what each position adds
        to the logit. Nothing is normalised, so maps of different images compare.
    """
    with torch.no_grad():
        features = model.feature_maps(images)
    maps = METHODS[method or methods(model)[0]](model, features.detach().requires_grad_(), labels, study)
    return torch.stack(list(maps), 1).detach()


def grad_cam(model, images, labels):
    """:func:`position_maps` by Grad-CAM, whatever head the model has."""
    return position_maps(model, images, labels, method="Grad-CAM")


def full_resolution(model, images, labels, study=(), method=None):
    """:func:`position_maps` over the pixels that they are made of: [N, K, S, S], of the same mean, so in their unit.

    The features of a position are not made of the pixels under it: DCNv3 samples where its offsets say, and a network
    may store at one position what it has seen at another. So a map is not stretched over the image but traced back: a
    pixel counts by how much the positions of the map depend on it, each weighted by its own value (the size of the
    gradient of half the map's sum of squares; for one position, its effective receptive field, Luo et al. 2016),
    smoothed over half the distance of two positions. It costs a backward pass a label.
    """
    images = images.detach().requires_grad_()
    found = []
    for cam in METHODS[method or methods(model)[0]](model, model.feature_maps(images), labels, study):
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
def first_positions(model, size):
    """The first position of each resolution: {positions in a row: x (= y) of the first as a part of the image's side}.

    Position k of n has that x + k / n, which is not always the middle of the k-th of n squares: a padded 3 x 3
    convolution of stride 2 looks around its first pixel, so the positions of InternImage or of a ResNet are nearly half
    a square further left and up than those of ConvNeXt or Swin, which cut squares. Found from the kernels, strides and
    paddings (Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks"); where no convolution
    or pooling shrinks, squares are cut.
    """
    steps = {}  # positions in a row before a layer -> (after it, by how many of those before the first one moves)

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


def last_position(model, size):
    """x (= y) of the first position of the last feature maps as a part of the image's side, see `first_positions`."""
    positions = first_positions(model, size)
    return positions[min(positions)]


@torch.no_grad()
def sampling_points(model, images, positions):
    """Where the last DCNv3 layer of each resolution looks, seen from one position of each image.

    images: [N, 3, S, S], normalised. positions: [N, 2], x and y as parts of the side.

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
    first, levels = first_positions(model, images.shape[-1]), []
    for (height, width), (layer, features) in sorted(found.items(), reverse=True):
        size = torch.tensor([width, height])
        cell = (
            ((positions.cpu() - first[width]) * size)
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
    """Where a map [h, w] is largest: (x, y) as parts of the sides.

    first: of :func:`first_positions`, for a map of positions; without it, a map of pixels.
    """
    row, column = np.unravel_index(np.argmax(cam), cam.shape)
    first = 0.5 / cam.shape[0] if first is None else first
    return first + column / cam.shape[1], first + row / cam.shape[0]
