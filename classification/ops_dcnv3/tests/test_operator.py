"""The operator against figures of the direct formula, numeric gradients and a slow loop in Python."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dcnv3 import DCNv3, dcnv3

GOLDEN = np.load(Path(__file__).with_name("dcnv3_op.npz"))
CASES = json.loads(str(GOLDEN["cases"]))


def arguments(case):
    return dict(
        group=case["group"],
        kernel=tuple(case["kernel"]),
        stride=tuple(case["stride"]),
        padding=tuple(case["pad"]),
        dilation=tuple(case["dilation"]),
        offset_scale=case["offset_scale"],
        remove_center=case["remove_center"],
    )


def random_inputs(n=2, h=6, w=7, group=3, width=4, points=9, spread=1.5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    input = torch.randn(n, h, w, group * width, generator=g, dtype=torch.float64)
    offset = torch.randn(n, h, w, group * points * 2, generator=g, dtype=torch.float64) * spread
    mask = torch.rand(n, h, w, group * points, generator=g, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (input, offset, mask)]


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_golden_forward_and_backward(case):
    tensor = {k.split(".")[1]: torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith(case["name"] + ".")}
    inputs = [tensor[k].requires_grad_() for k in ("input", "offset", "mask")]
    output = dcnv3(*inputs, **arguments(case))
    output.backward(tensor["grad_output"])
    torch.testing.assert_close(output, tensor["output"], rtol=0, atol=1e-10)
    for name, t in zip(("grad_input", "grad_offset", "grad_mask"), inputs):
        torch.testing.assert_close(t.grad, tensor[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def loop(input, offset, mask, group, kernel, stride, padding, dilation, scale):
    """The formula one number at a time: every dimension has its own size, nothing is vectorised."""
    n_, h_, w_, channels = input.shape
    _, ho, wo, _ = offset.shape
    kh, kw = kernel
    width, points = channels // group, kh * kw
    out = np.zeros((n_, ho, wo, channels))
    for n, y, x, g in np.ndindex(n_, ho, wo, group):
        for p in range(points):
            i, j = divmod(p, kh)
            ex, ey = (dilation[1] * (kw - 1)) // 2, (dilation[0] * (kh - 1)) // 2
            ox, oy = offset[n, y, x, (g * points + p) * 2 : (g * points + p) * 2 + 2]
            px = ex - padding[1] + x * stride[1] - ex * scale + (i * dilation[1] + ox) * scale
            py = ey - padding[0] + y * stride[0] - ey * scale + (j * dilation[0] + oy) * scale
            if not (-1 < px < w_ and -1 < py < h_):
                continue
            for cy in (math.floor(py), math.floor(py) + 1):
                for cx in (math.floor(px), math.floor(px) + 1):
                    if 0 <= cy < h_ and 0 <= cx < w_:
                        weight = (1 - abs(px - cx)) * (1 - abs(py - cy)) * mask[n, y, x, g * points + p]
                        out[n, y, x, g * width : (g + 1) * width] += (
                            weight * input[n, cy, cx, g * width : (g + 1) * width]
                        )
    return out


def test_every_dimension_different_against_the_loop():
    rng = np.random.default_rng(3)
    group, width, kernel, stride, padding, dilation = 3, 5, (3, 2), (2, 1), (2, 1), (1, 2)
    n, h, w = 2, 9, 7
    ho = (h + 4 - 3) // 2 + 1
    wo = (w + 2 - 3) // 1 + 1
    input = rng.standard_normal((n, h, w, group * width))
    offset = rng.standard_normal((n, ho, wo, group * 6 * 2)) * 2
    mask = rng.random((n, ho, wo, group * 6))
    expected = loop(input, offset, mask, group, kernel, stride, padding, dilation, 1.5)
    got = dcnv3(
        *map(torch.from_numpy, (input, offset, mask)),
        group=group, kernel=kernel, stride=stride, padding=padding, dilation=dilation, offset_scale=1.5,
    )  # fmt: skip
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("remove_center", [False, True])
def test_gradcheck(remove_center):
    inputs = random_inputs(n=1, h=3, w=4, group=2, width=2, points=9 - remove_center)
    assert torch.autograd.gradcheck(lambda *t: dcnv3(*t, group=2, remove_center=remove_center), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype):
    """Sums in float32: the result is the float64 one of the same rounded inputs, rounded to dtype."""
    inputs = random_inputs(dtype=dtype)
    output = dcnv3(*inputs, group=3)
    exact = dcnv3(*(t.detach().double() for t in inputs), group=3)
    assert output.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), exact, rtol=2 * eps, atol=2e-6)
    output.float().square().sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.isfinite().all() for t in inputs)


def test_autocast_casts_all_three():
    inputs = random_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = dcnv3(*inputs, group=3)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


def test_views_and_empty_batch():
    input, offset, mask = (t.detach() for t in random_inputs())
    expected = dcnv3(input, offset, mask, group=3)
    strided = [torch.stack([t, t + 1], -1)[..., 0] for t in (input, offset, mask)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(dcnv3(*strided, group=3), expected, rtol=0, atol=0)
    empty = [t[:0].requires_grad_() for t in (input, offset, mask)]
    output = dcnv3(*empty, group=3)
    assert output.shape == (0, *input.shape[1:])
    output.sum().backward()
    assert empty[0].grad.shape == empty[0].shape


def test_offsets_that_are_nowhere_sample_zero():
    input, offset, mask = (t.detach() for t in random_inputs(group=1, width=4))
    for value in (math.nan, math.inf, -math.inf, 1e30):
        moved = torch.full_like(offset, value).requires_grad_()
        x = input.clone().requires_grad_()
        output = dcnv3(x, moved, mask, group=1)
        output.sum().backward()
        assert (output == 0).all() and (x.grad == 0).all() and (moved.grad == 0).all()


def test_memory_is_not_nine_times_the_output(monkeypatch):
    """Only the three inputs are kept for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        inputs = random_inputs(dtype=torch.float32)
        dcnv3(*inputs, group=3)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(group=5), "12 channels do not divide into 5 groups"),
        (dict(kernel=(3,)), "kernel must be two integers"),
        (dict(stride=(0, 1)), "stride must be two integers"),
        (dict(kernel=(9, 9), padding=(0, 0)), "smaller than the dilated kernel"),
        (dict(kernel=(2, 2), remove_center=True), "kernel of odd size"),
        (dict(kernel=(1, 1), padding=(0, 0)), r"offset must have shape \(2, 6, 7, 6\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dcnv3(*random_inputs(), **{"group": 3, **change})


def test_wrong_tensors_are_named():
    input, offset, mask = random_inputs()
    with pytest.raises(ValueError, match="mask must have shape"):
        dcnv3(input, offset, mask[:1], group=3)
    with pytest.raises(ValueError, match="offset must be floating point"):
        dcnv3(input, offset.detach().long(), mask, group=3)
    with pytest.raises(ValueError, match=r"input must be \[N, H, W, channels\]"):
        dcnv3(input[0], offset, mask, group=3)
    with pytest.raises(ValueError, match="mask is on meta, the input on cpu"):
        dcnv3(input, offset, mask.to("meta"), group=3)


@pytest.mark.parametrize("scale", [False, True])
def test_module_starts_as_a_plain_average(scale):
    """Zero offsets and equal masks: a 3x3 box filter between the projections."""
    torch.manual_seed(0)
    module = DCNv3(8, 2, center_feature_scale=scale).double()
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    projected = module.input_proj(x)
    box = torch.nn.functional.avg_pool2d(projected.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    if scale:
        box = 0.5 * box + 0.5 * projected
    torch.testing.assert_close(module(x), module.output_proj(box), rtol=0, atol=1e-12)
