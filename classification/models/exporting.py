"""A model as a graph that runs without this project: ONNX of standard operators, or a program of torch.export."""

import contextlib
import importlib
import io
import json
import warnings
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from dcnv3.definition import kernel_points

FIRST_OPSET = 19  # of ONNX, the first with DeformConv


class Probabilities(nn.Module):
    """The model with its last step: images [B, 3, S, S] float32, normalised -> probabilities [B, labels] float32."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images).sigmoid()


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
        offset = op.Add(op.Mul(offset, constant([float(offset_scale)])), constant(stretched))
    ones = op.Expand(constant([1.0]), constant([channels, 1, *kernel]))
    output = op.DeformConv(
        op.Transpose(input, perm=[0, 3, 1, 2]), ones, planes(offset), None, planes(mask),
        group=channels, offset_group=group, kernel_shape=list(kernel), strides=list(stride),
        dilations=list(dilation), pads=[*padding, *padding],
    )  # fmt: skip
    return op.Transpose(output, perm=[0, 2, 3, 1])


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


def save_onnx(model, size, path, *, metadata, opset=20):
    """Write a model of images [B, 3, size, size] as ONNX, B free; weights beyond 2 GB go to `<path>.data`.

    metadata: name -> text, kept in the file.

    Raises:
        UserError: a package that is missing, an opset without DeformConv, an operator that ONNX lacks.
    """
    if opset < FIRST_OPSET:
        raise UserError(f"--opset {opset} has no DeformConv, which DCNv3 becomes; choose {FIRST_OPSET} or later")
    require("onnx", "onnxscript")
    images, batch = _example(size)
    try:
        with _quiet():
            program = torch.onnx.export(
                model.eval(), images, dynamo=True, opset_version=opset, dynamic_shapes=batch, verbose=False,
                input_names=["images"], output_names=["probabilities"],
                custom_translation_table={torch.ops.dcnv3.forward.default: _deform_conv},
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error  # the exporter's own text is for its developers
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise UserError(f"ONNX of opset {opset} cannot hold this model: {reason}") from error
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
