"""A model as a graph that runs without this project: ONNX of standard operators, or a program of torch.export."""

import contextlib
import copy
import importlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.errors import UserError, reason
from config import KNOBS, to_dict
from dcnv3.definition import kernel_points

FIRST_OPSET = 19  # of ONNX, the first with DeformConv


class Probabilities(nn.Module):
    """The model with its last step: images [B, 3, S, S] float32, normalised -> probabilities [B, labels] float32.

    half: whether the model computes in float16, between the two. classes: each image is of one of the labels.
    """

    def __init__(self, model, half=False, classes=False):
        super().__init__()
        self.classes = classes
        self.model = copy.deepcopy(model).half() if half else model
        self.dtype = torch.float16 if half else torch.float32

    def forward(self, images):
        logits = self.model(images.to(self.dtype)).float()
        return logits.softmax(1) if self.classes else logits.sigmoid()


class Mapped(nn.Module):
    """Probabilities [B, labels], and what each position adds to each logit, [B, labels, h, w]; see `pools_linearly`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        features = self.model.feature_maps(images)
        weight = self.model.get_submodule(self.model.classifier).weight[:, :, None, None]
        maps = nn.functional.conv2d(features, weight) / (features.shape[2] * features.shape[3])
        return self.model.classify(features).float().sigmoid(), maps


@torch.no_grad()
def pools_linearly(model, size):
    """Whether the logits are linear in the mean of the last feature maps: then they are a sum over the positions."""
    try:
        features = torch.randn_like(model.feature_maps(torch.zeros(1, 3, size, size)))
        expected = model.get_submodule(model.classifier)(features.mean((2, 3)))
        return torch.allclose(model.classify(features), expected, atol=1e-4)
    except (AttributeError, RuntimeError, UserError):  # no feature maps, or not those that the classifier takes
        return False


def _deform_conv(
    input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, mask_is_logits
):
    """`dcnv3::forward` in ONNX: one DeformConv (opset 19) with a depthwise weight of ones.

    DeformConv adds offsets (y, x) to a grid that `offset_scale` does not stretch, row by row; DCNv3's
    points go column by column as (x, y), and its grid is stretched around the kernel's centre.
    """
    from onnxscript import opset19 as op

    def constant(values):
        return op.Constant(value_floats=values) if isinstance(values[0], float) else op.Constant(value_ints=values)

    def planes(tensor):  # [N, Ho, Wo, G, ...] -> [N, G * ..., Ho, Wo]
        return op.Transpose(op.Reshape(tensor, constant([0, 0, 0, -1])), perm=[0, 3, 1, 2])

    points, channels = kernel_points(kernel, remove_center), input.shape[3]
    row_major = [(i, j) for j in range(kernel[0]) for i in range(kernel[1])]
    # A removed centre comes back with weight 0: it takes the entry that padding puts behind the points.
    order = [points.index(p) if p in points else len(points) for p in row_major]

    mask = op.Reshape(mask, constant([0, 0, 0, group, len(points)]))
    if mask_is_logits:
        mask = op.Softmax(mask, axis=-1)
    offset = op.Reshape(offset, constant([0, 0, 0, group, 2 * len(points)]))
    if remove_center:
        mask = op.Pad(mask, constant([0] * 9 + [1]))
        offset = op.Pad(offset, constant([0] * 9 + [2]))
    mask = op.Gather(mask, constant(order), axis=4)
    offset = op.Gather(offset, constant([2 * k + c for k in order for c in (1, 0)]), axis=4)
    if offset_scale != 1:
        middle = [(d * (k - 1)) // 2 for k, d in zip(kernel, dilation)]
        grid = [(j * dilation[0] - middle[0], i * dilation[1] - middle[1]) for i, j in row_major]
        stretched = [float((offset_scale - 1) * c) for point in grid for c in point]
        offset = op.Mul(offset, op.CastLike(constant([float(offset_scale)]), offset))
        offset = op.Add(offset, op.CastLike(constant(stretched), offset))
    ones = op.Expand(op.CastLike(constant([1.0]), input), constant([channels, 1, *kernel]))
    output = op.DeformConv(
        op.Transpose(input, perm=[0, 3, 1, 2]), ones, planes(offset), None, planes(mask),
        group=channels, offset_group=group, kernel_shape=list(kernel), strides=list(stride),
        dilations=list(dilation), pads=[*padding, *padding],
    )  # fmt: skip
    return op.Transpose(output, perm=[0, 2, 3, 1])


def _grid_sample(
    input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, mask_is_logits
):
    """`dcnv3::forward` in ONNX without DeformConv: one GridSample (opset 20) of all groups and points.

    GridSample takes positions from -1 to 1, the borders of the map; beyond them it reads zeros, as DCNv3 does.
    """
    import onnx
    from onnxscript import opset20 as op

    def constant(values):
        return op.Constant(value=onnx.numpy_helper.from_array(np.asarray(values)))

    points = np.array(kernel_points(kernel, remove_center))  # [P, 2], x and y
    _, height, width, channels = input.shape
    _, rows, columns = offset.shape[:3]
    count, depth = len(points), channels // group
    # Positions [rows, columns, P, 2] in pixels where all offsets are zero: the grid is stretched around its middle.
    step, pad, spread = (np.array(v[::-1]) for v in (stride, padding, dilation))
    middle = spread * (np.array(kernel[::-1]) - 1) // 2
    output = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1)[:, :, None]
    still = middle - pad + output * step + (points * spread - middle) * offset_scale
    size = np.array([width, height])
    still, scale = (2 * still + 1) / size - 1, 2 * offset_scale / size

    def by_group(tensor, *last):  # [N, rows, columns, G * ...] -> [N, G, rows, columns, ...]
        tensor = op.Reshape(tensor, constant([0, 0, 0, group, *last]))
        return op.Transpose(tensor, perm=[0, 3, 1, 2, *range(4, 4 + len(last))])

    mask = by_group(mask, count)
    if mask_is_logits:
        mask = op.Softmax(mask, axis=-1)
    mask = op.Reshape(mask, constant([-1, 1, rows, columns, count]))
    offset = by_group(offset, count, 2)
    offset = op.Mul(offset, op.CastLike(constant(scale.astype(np.float32)), offset))
    grid = op.Add(offset, op.CastLike(constant(still.astype(np.float32)), offset))
    grid = op.Reshape(grid, constant([-1, rows, columns * count, 2]))
    planes = op.Reshape(op.Transpose(input, perm=[0, 3, 1, 2]), constant([-1, depth, height, width]))
    found = op.GridSample(planes, grid, mode="linear", padding_mode="zeros", align_corners=0)
    found = op.Mul(op.Reshape(found, constant([-1, depth, rows, columns, count])), mask)
    found = op.ReduceSum(found, constant([4]), keepdims=0)
    return op.Transpose(op.Reshape(found, constant([-1, channels, rows, columns])), perm=[0, 2, 3, 1])


@contextlib.contextmanager
def _quiet():
    """Without the exporter's own warnings, which are for its developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def require(*packages):
    """The optional packages, imported, or a UserError that names the missing one."""
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements_export.txt") from error


def _example(size):
    # Two images: the exporter treats a batch of one as a constant.
    return (torch.zeros(2, 3, size, size),), ({0: torch.export.Dim("batch", min=1, max=4096)},)


def save_onnx(model, size, path, *, metadata, opset=20, decompose=False):
    """Write a model of images [B, 3, size, size] as ONNX, B free; weights beyond 2 GB go to `<path>.data`.

    metadata: name -> text, kept in the file. decompose: DCNv3 becomes GridSample instead of DeformConv.

    UserError: a package that is missing, an opset without DeformConv, an operator that ONNX lacks.
    """
    name, first = ("GridSample of this form", 20) if decompose else ("DeformConv", FIRST_OPSET)
    if opset < first:
        raise UserError(f"--opset {opset} has no {name}, which DCNv3 becomes; choose {first} or later")
    onnx, _ = require("onnx", "onnxscript")
    if opset > (last := onnx.defs.onnx_opset_version()):
        raise UserError(f"--opset {opset}: the installed onnx has opsets up to {last}; choose {first} to {last}")
    images, batch = _example(size)
    try:
        with _quiet():
            program = torch.onnx.export(
                model.eval(), images, dynamo=True, opset_version=opset, dynamic_shapes=batch, verbose=False,
                input_names=["images"], output_names=["probabilities", "maps"][: 1 + isinstance(model, Mapped)],
                custom_translation_table={torch.ops.dcnv3.forward.default: _grid_sample if decompose else _deform_conv},
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error  # the exporter's own text is for its developers
        raise UserError(f"ONNX of opset {opset} cannot hold this model: {reason(cause)}") from error
    written = program.model.opset_imports[""]
    if written != opset:
        raise UserError(f"--opset {opset}: this torch and onnxscript write opset {written} instead; choose another")
    program.model.metadata_props.update(metadata)
    program.save(path)


def save_torch(model, size, path, *, metadata):
    """Write a program of torch.export of the same inputs and outputs, metadata in its extra file metadata.json.

    Its operator is `dcnv3::forward`: `import dcnv3` before `torch.export.load(path)`.
    """
    images, batch = _example(size)
    with _quiet():
        program = torch.export.export(model.eval(), images, dynamic_shapes=batch)
        content = io.BytesIO()  # torch's own file writer kills the process if the disk is full
        torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata)})
    Path(path).write_bytes(content.getbuffer())


# Options with names of folders and files of the machine, or of the run.
_PRIVATE = ["DATA.DATA_PATH", "DATA.SOURCES", "DATA.CSV", "DATA.IMAGES", "DATA.PSEUDO_LABELS"]
_PRIVATE += "MODEL.PRETRAINED MODEL.RESUME OUTPUT RESULTS TAG".split()


def save_weights(weights, config, label_names, path, *, domain, classes=False):
    """Write a checkpoint to share: weights, labels, and the config without paths; no patients, optimizer or history.

    --pretrained, predict.py and export.py take it.
    """
    settings = to_dict(config)
    for key, knob in KNOBS.items():
        *parents, name = key.split(".")
        node = settings
        for parent in parents:
            node = node[parent]
        if key in _PRIVATE or (isinstance(node[name], str) and node[name].startswith(("/", "~"))):
            node[name] = copy.deepcopy(knob.default)
    state = {"model": weights, "model_ema": None, "weights": "shared", "label_names": list(label_names)}
    state["task"] = "single_label" if classes else "multilabel"
    content = io.BytesIO()  # as above
    torch.save(state | {"config": settings, "domain": domain}, content)
    Path(path).write_bytes(content.getbuffer())
