"""The numbers of the operator: against the direct formula, numeric gradients, a slow loop, and the reference."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common import DEVICES, DTYPES, IMPLEMENTATIONS, assert_same, random_inputs, results
from dcnv3 import DCNv3, dcnv3, reference

GOLDEN = np.load(Path(__file__).with_name("dcnv3_op.npz"))
CASES = json.loads(str(GOLDEN["cases"]))
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_device = pytest.mark.parametrize("device", DEVICES)


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


@both
@every_device
@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_golden_forward_and_backward(case, implementation, device):
    names = ("input", "offset", "mask", "grad_output", "output", "grad_input", "grad_offset", "grad_mask")
    tensor = {name: torch.from_numpy(GOLDEN[f"{case['name']}.{name}"]).to(device) for name in names}
    inputs = [tensor[name].requires_grad_() for name in names[:3]]
    output = IMPLEMENTATIONS[implementation](*inputs, **arguments(case))
    output.backward(tensor["grad_output"])
    assert_same([output, *(t.grad for t in inputs)], [tensor[name] for name in names[4:]], rtol=0, atol=1e-10)


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


@both
def test_every_dimension_different_against_the_loop(implementation):
    rng = np.random.default_rng(3)
    group, width, kernel, stride, padding, dilation = 3, 5, (3, 2), (2, 1), (2, 1), (1, 2)
    n, h, w = 2, 9, 7
    ho = (h + 4 - 3) // 2 + 1
    wo = (w + 2 - 3) // 1 + 1
    input = rng.standard_normal((n, h, w, group * width))
    offset = rng.standard_normal((n, ho, wo, group * 6 * 2)) * 2
    mask = rng.random((n, ho, wo, group * 6))
    expected = loop(input, offset, mask, group, kernel, stride, padding, dilation, 1.5)
    got = IMPLEMENTATIONS[implementation](
        *map(torch.from_numpy, (input, offset, mask)),
        group=group, kernel=kernel, stride=stride, padding=padding, dilation=dilation, offset_scale=1.5,
    )  # fmt: skip
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@both
@pytest.mark.parametrize("remove_center", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_gradcheck(implementation, remove_center, logits):
    inputs = random_inputs(n=1, h=2, w=3, group=2, width=2, points=9 - remove_center)
    function = IMPLEMENTATIONS[implementation]
    assert torch.autograd.gradcheck(
        lambda *t: function(*t, group=2, remove_center=remove_center, mask_is_logits=logits), inputs, fast_mode=True
    )


@both
def test_logits_are_a_softmax_first(implementation):
    function = IMPLEMENTATIONS[implementation]
    inputs = random_inputs()
    inputs[2].data.mul_(20)  # some points get almost nothing

    def softmaxed(input, offset, logits, group):
        mask = logits.unflatten(-1, (group, 9)).softmax(-1).flatten(-2)
        return function(input, offset, mask, group=group)

    assert_same(
        results(function, inputs, group=3, mask_is_logits=True), results(softmaxed, inputs, group=3), rtol=0, atol=1e-12
    )


@every_device
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize(
    "group, width", [(3, w) for w in (1, 3, 7, 12, 16, 20, 32, 64)] + [(g, 4) for g in (7, 28, 80, 96)]
)
def test_any_width_and_number_of_groups(group, width, logits, device):
    inputs = random_inputs(h=5, w=9, group=group, width=width, device=device)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        cast = [t.detach().to(dtype) for t in inputs]
        assert_same(
            results(dcnv3, cast, group=group, mask_is_logits=logits),
            results(reference, cast, group=group, mask_is_logits=logits),
            rtol=tolerance,
            atol=tolerance,
        )


@every_device
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation, scale, remove_center",
    [
        ((1, 1), (1, 1), (0, 0), (1, 1), 1.0, False),
        ((3, 5), (2, 3), (0, 4), (2, 1), 0.7, True),
        ((2, 4), (1, 2), (3, 0), (1, 2), 2.0, False),
        ((5, 5), (3, 1), (2, 2), (1, 1), 1.3, True),
        ((13, 13), (1, 1), (6, 6), (1, 1), 1.0, False),  # more points than a tile of the CPU kernel
    ],
)
def test_any_kernel(kernel, stride, padding, dilation, scale, remove_center, device):
    h, w = 11, 14
    out = tuple(
        (size + 2 * p - (d * (k - 1) + 1)) // s + 1
        for size, k, s, p, d in zip((h, w), kernel, stride, padding, dilation)
    )
    points = kernel[0] * kernel[1] - remove_center
    inputs = random_inputs(h=h, w=w, width=5, points=points, out=out, device=device)
    a = dict(group=3, kernel=kernel, stride=stride, padding=padding, dilation=dilation, offset_scale=scale)
    a.update(remove_center=remove_center, mask_is_logits=True)
    assert_same(results(dcnv3, inputs, **a), results(reference, inputs, **a), rtol=0, atol=1e-11)


@both
@every_device
@pytest.mark.parametrize("width", [3, 16])
def test_a_corner_of_weight_0_gets_nothing(width, implementation, device):
    """Not even the NaN of an infinite output gradient times 0. At integer offsets a point is one pixel: around the
    pixel with the infinite gradient the input's gradient is infinite, and elsewhere that of a box filter."""
    inputs = [torch.zeros(1, 7, 8, width, device=device), torch.zeros(1, 7, 8, 18, device=device)]
    inputs = [t.requires_grad_() for t in (*inputs, torch.ones(1, 7, 8, 9, device=device))]
    grad = torch.ones(1, 7, 8, width, device=device)
    grad[0, 3, 4, 1] = math.inf
    (got,) = torch.autograd.grad(IMPLEMENTATIONS[implementation](*inputs, group=1), inputs[:1], grad)
    finite = torch.nn.functional.avg_pool2d(torch.ones(1, 1, 7, 8), 3, 1, 1)[0, 0] * 9
    expected = finite.to(device)[None, ..., None].repeat(1, 1, 1, width)
    expected[0, 2:5, 3:6, 1] = math.inf
    torch.testing.assert_close(got, expected)


@both
@every_device
@pytest.mark.parametrize("n", [1, 2, 3, 33])
def test_a_batch_is_its_images(n, implementation, device):
    function = IMPLEMENTATIONS[implementation]
    inputs = random_inputs(n=n, h=3, w=4, dtype=torch.float32, device=device)
    together = function(*inputs, group=3)
    for i in range(n):
        torch.testing.assert_close(together[i : i + 1], function(*(t[i : i + 1] for t in inputs), group=3))


@both
@every_device
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_errs_at_most_twice_the_reference(dtype, implementation, device):
    """Sums in float32: as near to float64 of the same rounded inputs as rounding the result allows."""
    inputs = random_inputs(h=9, w=8, group=2, width=16, dtype=dtype, device=device)
    a = dict(group=2, mask_is_logits=True)
    exact = results(reference, [t.detach().double() for t in inputs], **a)
    theirs = results(reference, inputs, **a)
    ours = results(IMPLEMENTATIONS[implementation], inputs, **a)
    for name, e, r, o in zip(("output", "grad_input", "grad_offset", "grad_mask"), exact, theirs, ours):
        assert o.dtype == dtype
        floor = torch.finfo(dtype).eps * e.abs().max()
        assert (o.double() - e).abs().max() <= 2 * (r.double() - e).abs().max() + 0.01 * floor, name


@both
@every_device
def test_views_and_empty_batch(implementation, device):
    function = IMPLEMENTATIONS[implementation]
    inputs = [t.detach() for t in random_inputs(width=16, dtype=torch.float32, device=device)]
    expected = results(function, inputs, group=3)
    # Every other element, channels first, and memory off any 16-byte border.
    strided = [torch.stack([t, t + 1], -1)[..., 0] for t in inputs]
    first = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in inputs]
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in inputs]
    for views in (strided, first, shifted):
        torch.testing.assert_close(function(*views, group=3), expected[0], rtol=1e-6, atol=1e-6)
        leaves = [v.requires_grad_() for v in views]
        grad = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        got = torch.autograd.grad(function(*leaves, group=3), leaves, grad.to(inputs[0]))
        assert_same([expected[0], *got], expected, rtol=1e-6, atol=1e-6)

    # One column, or one pixel: torch calls these contiguous, whatever their strides are.
    for shape, dims in (((2, 1, 5), (0, 2, 1)), ((1, 1, 3), (2, 0, 1))):
        base = [torch.randn(*shape, t.shape[-1], device=device) for t in inputs]
        thin = [t.permute(*dims, 3) for t in base]
        dense = [t.clone(memory_format=torch.contiguous_format) for t in thin]
        assert thin[1].is_contiguous() and thin[1].stride() != dense[1].stride()
        torch.testing.assert_close(function(*thin, group=3), function(*dense, group=3), rtol=0, atol=0)

    empty = [t[:0].requires_grad_() for t in inputs]
    output = function(*empty, group=3)
    assert output.shape == (0, *inputs[0].shape[1:])
    output.sum().backward()
    assert empty[0].grad.shape == empty[0].shape


@both
@every_device
@pytest.mark.parametrize("padding", [0, 5])
def test_slices_of_one_projection(implementation, padding, device):
    """Offset and logits as slices of a wider tensor, whose gradient comes back in one piece."""
    function = IMPLEMENTATIONS[implementation]
    input, offset, mask = random_inputs(device=device)
    wide = torch.cat([offset, mask, mask.new_zeros(*mask.shape[:3], padding)], -1).detach().requires_grad_()
    sizes = (offset.shape[-1], mask.shape[-1], padding)
    a, b, _ = wide.split(sizes, -1)
    output = function(input, a, b, group=3, mask_is_logits=True)
    expected = function(input, offset, mask, group=3, mask_is_logits=True)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    output.sum().backward()
    grads = torch.autograd.grad(expected.sum(), (offset, mask))
    torch.testing.assert_close(wide.grad[..., : sum(sizes[:2])], torch.cat(grads, -1), rtol=0, atol=1e-12)


@both
@every_device
def test_integers_and_borders(implementation, device):
    """At an integer the cell is that of floor, and a point counts less than one pixel outside."""
    input = torch.arange(1.0, 5, dtype=torch.float64, device=device).view(1, 1, 4, 1).repeat(1, 2, 1, 1)
    for x, value, slope in (
        (-1.0, 0, 0), (-0.999, 0.001, 1), (0.0, 1, 1), (1.0, 2, 1), (2.5, 3.5, 1),
        (3.0, 4, -4), (3.75, 1, -4), (4.0, 0, 0), (1e9, 0, 0),
    ):  # fmt: skip
        offset = torch.tensor([x, 0.0], dtype=torch.float64, device=device).view(1, 1, 1, 2)
        offset = offset.expand(1, 2, 4, 2).clone().sub_(torch.tensor([1.0, 0.0], device=device)).requires_grad_()
        mask = torch.ones(1, 2, 4, 1, dtype=torch.float64, device=device)
        a = dict(group=1, kernel=(1, 1), padding=(0, 0))
        output = IMPLEMENTATIONS[implementation](input, offset, mask, **a)
        output[0, 0, 1, 0].backward()  # the pixel at column 1: sampled at x
        assert output[0, 0, 1, 0].item() == pytest.approx(value, abs=1e-12)
        assert offset.grad[0, 0, 1, 0].item() == pytest.approx(slope, abs=1e-12)


@both
@every_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_that_are_nowhere_sample_zero(implementation, dtype, device):
    function = IMPLEMENTATIONS[implementation]
    input, offset, mask = (t.detach() for t in random_inputs(group=1, dtype=dtype, device=device))
    for value in (math.nan, math.inf, -math.inf, 6e4):
        for axis in (slice(None), slice(0, None, 2), slice(1, None, 2)):  # both, x, y
            moved = offset.clone()
            moved[..., axis] = value
            x, moved = input.clone().requires_grad_(), moved.requires_grad_()
            output = function(x, moved, mask, group=1)
            output.sum().backward()
            assert (output == 0).all() and (x.grad == 0).all() and (moved.grad == 0).all()


@every_device
def test_indices_beyond_2_to_the_31(device):
    """One image of 2.2e9 numbers, of which a few pixels are ever looked at: memory is taken on first use. The result
    there is that of a window around them. The CPU's backward pass would fill all of it, so it is left out."""
    size, channels, group, stride, at = 8200, 33, 3, 4094, 8188  # the last output pixel looks around (at, at)
    needed = size * size * channels * (2 if device == "cpu" else 16)
    if device == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip("the GPU has too little memory")
    assert (at * size + at) * channels > 2**31
    window, offset, mask = (t.detach() for t in random_inputs(n=1, h=9, w=9, group=group, width=11, device=device))
    window, offset, mask = (t.to(torch.bfloat16).requires_grad_() for t in (window, offset, mask))
    expected = reference(window, offset, mask, group=group)[:, 4, 4]

    input = torch.empty(1, size, size, channels, dtype=torch.bfloat16, device=device)
    if device == "cuda":
        input.zero_()
    input[:, at - 4 : at + 5, at - 4 : at + 5] = window.detach()
    far = [torch.zeros(1, 3, 3, t.shape[-1], dtype=t.dtype, device=device) for t in (offset, mask)]
    for few, t in zip(far, (offset, mask)):
        few[:, 2, 2] = t.detach()[:, 4, 4]
    leaves = [t.requires_grad_(device == "cuda") for t in (input, *far)]
    output = dcnv3(*leaves, group=group, stride=(stride, stride))
    torch.testing.assert_close(output[:, 2, 2], expected, rtol=2**-7, atol=2**-7)
    if device == "cuda":
        expected.sum().backward()
        output[:, 2, 2].sum().backward()
        got = (input.grad[:, at - 4 : at + 5, at - 4 : at + 5], *(t.grad[:, 2, 2] for t in far))
        want = (window.grad, *(t.grad[:, 4, 4] for t in (offset, mask)))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


def test_the_number_of_threads_changes_nothing():
    inputs = random_inputs(h=13, w=11, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(dcnv3, inputs, group=3)
        torch.set_num_threads(3)
        assert_same(results(dcnv3, inputs, group=3), one, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


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


@pytest.mark.parametrize("group, remove_center", [(1, False), (3, True), (8, False)])
def test_module_equals_its_layers_one_by_one(group, remove_center):
    """The fused projection and softmax change nothing but the rounding, and every parameter gets its gradient."""
    torch.manual_seed(0)
    module = DCNv3(8 * group, group, remove_center=remove_center).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 5, 6, 8 * group, dtype=torch.float64)
    features = module.dw_conv(x.permute(0, 3, 1, 2))
    mask = module.mask(features).unflatten(-1, (group, module.points)).softmax(-1).flatten(-2)
    y = reference(module.input_proj(x), module.offset(features), mask, group=group, remove_center=remove_center)
    expected = module.output_proj(y)
    output = module(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    parameters = dict(module.named_parameters())
    for name, got, want in zip(
        parameters,
        torch.autograd.grad(output.square().sum(), parameters.values()),
        torch.autograd.grad(expected.square().sum(), parameters.values()),
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
