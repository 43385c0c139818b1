"""The functions models call. Arguments are checked here, once, before anything runs."""

import torch

from . import _ops  # noqa: F401  declares torch.ops.dcnv3
from .definition import differentiable_forward, kernel_points

# Asked here once: torch.compile of PyTorch before 2.13 cannot follow the question.
_AUTOCAST = tuple(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


def _pair(name, value, minimum):
    if len(value) != 2 or not all(isinstance(v, int) and v >= minimum for v in value):
        raise ValueError(f"dcnv3: {name} must be two integers (height, width) of at least {minimum}, got {value!r}")
    return tuple(value)


def output_size(height, width, *, kernel, stride, padding, dilation):
    """(Ho, Wo) of an input of (height, width) pixels."""
    return tuple(
        (size + 2 * p - (d * (k - 1) + 1)) // s + 1
        for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation)
    )


def _checked(
    input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, mask_is_logits
):
    """The arguments of `dcnv3::forward`, cast under autocast, or a ValueError that says what does not fit."""
    kernel, stride, dilation = _pair("kernel", kernel, 1), _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    padding = _pair("padding", padding, 0)
    if input.dim() != 4:
        raise ValueError(f"dcnv3: input must be [N, H, W, channels], got shape {tuple(input.shape)}")
    batch, height, width, channels = input.shape
    if height < 1 or width < 1 or channels < 1:
        raise ValueError(f"dcnv3: the input has no pixels or no channels: shape {tuple(input.shape)}")
    if group < 1 or channels % group:
        raise ValueError(f"dcnv3: the input's {channels} channels do not divide into {group} groups")
    if remove_center and (kernel[0] % 2 == 0 or kernel[1] % 2 == 0):
        raise ValueError(f"dcnv3: remove_center needs a kernel of odd size, got {kernel}")
    points = len(kernel_points(kernel, remove_center))
    if points == 0:
        raise ValueError("dcnv3: remove_center leaves no point of a 1x1 kernel")
    out_h, out_w = output_size(height, width, kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    if out_h < 1 or out_w < 1:
        raise ValueError(f"dcnv3: an input of {height}x{width} pixels is smaller than the dilated kernel {kernel}")
    for name, tensor, last in (("offset", offset, group * points * 2), ("mask", mask, group * points)):
        expected = (batch, out_h, out_w, last)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"dcnv3: {name} must have shape {expected}, got {tuple(tensor.shape)}")
        if tensor.device != input.device:
            raise ValueError(f"dcnv3: {name} is on {tensor.device}, the input on {input.device}")
    for name, tensor in (("input", input), ("offset", offset), ("mask", mask)):
        if not tensor.is_floating_point():
            raise ValueError(f"dcnv3: {name} must be floating point, got {tensor.dtype}")

    device = input.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, offset, mask = (t if t.dtype == torch.float64 else t.to(dtype) for t in (input, offset, mask))
    for name, tensor in (("offset", offset), ("mask", mask)):
        if tensor.dtype != input.dtype:
            raise ValueError(f"dcnv3: {name} is {tensor.dtype}, the input {input.dtype}: cast one of them")
    shape = (group, kernel, stride, padding, dilation)
    return input, offset, mask, *shape, float(offset_scale), bool(remove_center), bool(mask_is_logits)


def dcnv3(
    input,
    offset,
    mask,
    *,
    group,
    kernel=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    offset_scale=1.0,
    remove_center=False,
    mask_is_logits=False,
):
    """Deformable convolution v3 (InternImage, arXiv:2211.05778, equation 2), channels last.

    Args:
        input: [N, H, W, G*D], floating point.
        offset: [N, Ho, Wo, G*P*2], in input pixels before `offset_scale`, as (x, y) of every point.
        mask: [N, Ho, Wo, G*P], the weight of every point; or its logits, with `mask_is_logits`.
        group: number of groups G; P = kernel height x width, less one with `remove_center`.
            Points are ordered by column, then by row.
        kernel, stride, padding, dilation: (height, width) each.
        offset_scale: stretches the kernel grid and the offsets alike.
        remove_center: leave the middle point out (odd kernels only).
        mask_is_logits: take the softmax of `mask` over the P points of a group first, within the
            kernel. Without it the caller does.

    Offset and mask may be slices of one wider tensor (the last dimension of a fused projection)
    without a copy; tensors with other strides are copied.

    Returns:
        [N, Ho, Wo, G*D] in the input's dtype; sums and positions are float32 or better.
        Samples outside the input count as zero, as do those at a NaN or infinite offset.
        Under autocast all three tensors are cast to the autocast dtype, but for those of float64.
        A second derivative, and one in forward mode, is a NotImplementedError.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the tensor.
    """
    return torch.ops.dcnv3.forward(
        *_checked(
            input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, mask_is_logits
        )
    )


def reference(
    input,
    offset,
    mask,
    *,
    group,
    kernel=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    offset_scale=1.0,
    remove_center=False,
    mask_is_logits=False,
):
    """:func:`dcnv3.dcnv3` in plain PyTorch on any device, whatever kernels are there: the oracle of the tests."""
    return differentiable_forward(
        *_checked(
            input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, mask_is_logits
        )
    )
