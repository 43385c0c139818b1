"""The operator within PyTorch: schema, compile, export, autocast, error messages, loading."""

import json
import warnings

import pytest
import torch
from torch.autograd import forward_ad

from common import DEVICES, IMPLEMENTATIONS, assert_same, random_inputs, results
from dcnv3 import DCNv3, _extension, _ops, dcnv3, kernels

every_device = pytest.mark.parametrize("device", DEVICES)
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
PARAMETERS = (3, (3, 3), (1, 1), (1, 1), (1, 1), 1.0, False)


@every_device
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, softmax, dtype):
    inputs = random_inputs(n=1, h=3, w=4, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.dcnv3.forward.default, (*inputs, *PARAMETERS, softmax))
    grad = torch.randn_like(inputs[0]).detach()
    inputs = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.dcnv3.backward.default, (grad, *inputs, *PARAMETERS, softmax))


@every_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(device, dynamic):
    module = DCNv3(12, 3, center_feature_scale=True).to(device)
    torch.nn.init.normal_(module.offset.weight, std=0.3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (5, 8):
        x = torch.randn(2, size, 6, 12, device=device)
        torch.testing.assert_close(compiled(x), module(x))
        module.zero_grad()
        compiled(x).square().sum().backward()
        got = {name: p.grad.clone() for name, p in module.named_parameters()}
        module.zero_grad()
        module(x).square().sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(got[name], p.grad, msg=lambda m, n=name: f"{n}: {m}")


@every_device
def test_exports(device):
    module = DCNv3(12, 3).to(device)
    x = torch.randn(2, 5, 6, 12, device=device)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "dcnv3.forward" in str(program.graph)
    more = torch.randn(3, 5, 6, 12, device=device)
    torch.testing.assert_close(program.module()(more), module(more))


@both
def test_meta_tensors_have_shapes_and_gradients(implementation):
    inputs = [t.detach().to("meta").requires_grad_() for t in random_inputs(dtype=torch.bfloat16)]
    output = IMPLEMENTATIONS[implementation](*inputs, group=3)
    assert output.is_meta and output.dtype == torch.bfloat16 and output.shape == inputs[0].shape
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert [(g.shape, g.dtype, g.is_meta) for g in gradients] == [(t.shape, t.dtype, True) for t in inputs]


@both
@every_device
def test_autocast_leaves_float64_alone(implementation, device):
    inputs = random_inputs(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = IMPLEMENTATIONS[implementation](*inputs, group=3)
        with pytest.raises(ValueError, match="offset is torch.bfloat16, the input torch.float64"):
            IMPLEMENTATIONS[implementation](inputs[0], inputs[1].float(), inputs[2], group=3)
    torch.testing.assert_close(output, IMPLEMENTATIONS[implementation](*inputs, group=3), rtol=0, atol=0)


@both
@every_device
def test_autocast_casts_all_three(implementation, device):
    inputs = random_inputs(dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = IMPLEMENTATIONS[implementation](*inputs, group=3)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


@both
def test_second_derivative_is_a_clear_error(implementation):
    inputs = random_inputs()
    (grad,) = torch.autograd.grad(
        IMPLEMENTATIONS[implementation](*inputs, group=3).square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises((NotImplementedError, RuntimeError), match="gradient of the gradient|once_differentiable"):
        grad.sum().backward()


def dual(function, inputs, number=0):
    """The tangent of the output where one input has one."""
    with forward_ad.dual_level():
        inputs = [forward_ad.make_dual(t, torch.ones_like(t)) if i == number else t for i, t in enumerate(inputs)]
        return forward_ad.unpack_dual(function(*inputs)).tangent


def dual_output_gradient(function, inputs):
    leaf = inputs[0].clone().requires_grad_()
    output = function(leaf, *inputs[1:])
    return dual(lambda grad: torch.autograd.grad(output, leaf, grad)[0], [torch.ones_like(output)])


# What has a derivative in forward mode in it, or a second one: function, inputs -> a tensor.
FORWARD_MODE = {
    "jvp": lambda f, t: torch.func.jvp(f, (*t,), (*map(torch.ones_like, t),))[1],
    "jacfwd": lambda f, t: torch.func.jacfwd(f, argnums=1)(*t),
    "linearize": lambda f, t: torch.func.linearize(f, *t)[1](*map(torch.ones_like, t)),
    "hessian": lambda f, t: torch.func.hessian(lambda *t: f(*t).square().sum(), argnums=2)(*t),
    "jacobian, forward": lambda f, t: torch.autograd.functional.jacobian(
        f, (*t,), strategy="forward-mode", vectorize=True
    ),
    "jvp by two vjps": lambda f, t: torch.autograd.functional.jvp(f, (*t,), (*map(torch.ones_like, t),))[1],
    "hessian backwards": lambda f, t: torch.autograd.functional.hessian(lambda *t: f(*t).square().sum(), (*t,)),
    **{f"dual {i}": lambda f, t, i=i: dual(f, t, i) for i in range(3)},
    "dual, a gradient wanted": lambda f, t: dual(f, [x.requires_grad_() for x in t]),
    "dual, no gradients": lambda f, t: torch.no_grad()(dual)(f, t),
    "dual output gradient": dual_output_gradient,
}


@both
@pytest.mark.parametrize("way", FORWARD_MODE)
def test_forward_mode_is_an_error_and_never_zeros(implementation, way):
    inputs = [t.detach() for t in random_inputs(n=1, h=2, w=3, group=2, width=2)]
    with pytest.raises((NotImplementedError, RuntimeError), match="not implemented|setup_context"):
        FORWARD_MODE[way](lambda *t: IMPLEMENTATIONS[implementation](*t, group=2), inputs)


def test_vmap_is_a_loop_over_the_examples():
    inputs = [t.detach() for t in random_inputs(n=3, h=2, w=3, group=2, width=2)]
    many = [torch.stack([t, t.flip(0)]) for t in inputs]

    def run(*t):
        return dcnv3(*t, group=2, mask_is_logits=True)

    together = torch.func.vmap(run)(*many)
    torch.testing.assert_close(together, torch.stack([run(*(t[i] for t in many)) for i in range(2)]), rtol=0, atol=0)
    one = torch.func.vmap(lambda offset: run(inputs[0], offset, inputs[2]), in_dims=3, out_dims=1)(
        torch.stack([inputs[1], -inputs[1]], 3)
    )
    torch.testing.assert_close(one[:, 1], run(inputs[0], -inputs[1], inputs[2]), rtol=0, atol=0)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(run, (*inputs,), vectorize=True), jacobian(run, (*inputs,)), rtol=0, atol=0)


@every_device
def test_deterministic_mode(device):
    inputs = random_inputs(n=2, h=20, w=21, dtype=torch.float32, spread=9, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first = results(dcnv3, inputs, group=3)
        for _ in range(3):
            assert_same(results(dcnv3, inputs, group=3), first, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


@both
def test_only_the_inputs_are_kept(implementation):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        inputs = random_inputs(dtype=torch.float32)
        IMPLEMENTATIONS[implementation](*inputs, group=3)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs}


@both
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(group=5), "12 channels do not divide into 5 groups"),
        (dict(kernel=(3,)), "kernel must be two integers"),
        (dict(stride=(0, 1)), "stride must be two integers"),
        (dict(kernel=(9, 9), padding=(0, 0)), "smaller than the dilated kernel"),
        (dict(kernel=(2, 2), remove_center=True), "kernel of odd size"),
        (dict(kernel=(1, 1), remove_center=True), "no point"),
        (dict(kernel=(1, 1), padding=(0, 0)), r"offset must have shape \(2, 6, 7, 6\)"),
    ],
)
def test_wrong_arguments_are_named(implementation, change, message):
    with pytest.raises(ValueError, match=message):
        IMPLEMENTATIONS[implementation](*random_inputs(), **{"group": 3, **change})


@both
def test_wrong_tensors_are_named(implementation):
    function = IMPLEMENTATIONS[implementation]
    input, offset, mask = random_inputs()
    with pytest.raises(ValueError, match="mask must have shape"):
        function(input, offset, mask[:1], group=3)
    with pytest.raises(ValueError, match="no pixels"):
        function(input[:, :0], offset, mask, group=3, padding=(4, 1))
    with pytest.raises(ValueError, match="offset must be floating point"):
        function(input, offset.detach().long(), mask, group=3)
    with pytest.raises(ValueError, match="offset is torch.float32, the input torch.float64"):
        function(input, offset.float(), mask, group=3)
    with pytest.raises(ValueError, match=r"input must be \[N, H, W, channels\]"):
        function(input[0], offset, mask, group=3)
    with pytest.raises(ValueError, match="mask is on meta, the input on cpu"):
        function(input, offset, mask.to("meta"), group=3)


@pytest.mark.skipif("cpu" not in kernels(), reason="no CPU kernels built")
def test_the_schema_itself_is_safe():
    """Who calls the operator past the checks gets an error, not somebody else's memory."""
    input, offset, mask = (t.detach() for t in random_inputs())
    grad = torch.zeros_like(input)
    for wrong in ((input, offset[..., :-2], mask), (input[..., :-1], offset, mask), (input, offset, mask.float())):
        with pytest.raises((ValueError, RuntimeError), match="do not fit"):
            torch.ops.dcnv3.forward(*wrong, *PARAMETERS, False)
        with pytest.raises((ValueError, RuntimeError), match="do not fit"):
            torch.ops.dcnv3.backward(grad, *wrong, *PARAMETERS, False)
    with pytest.raises((ValueError, RuntimeError), match="do not fit"):
        torch.ops.dcnv3.backward(grad[:, :-1], input, offset, mask, *PARAMETERS, False)


def test_a_device_without_kernels_is_said_once(monkeypatch):
    monkeypatch.setattr(_ops, "_said", set())
    monkeypatch.setattr(_extension, "_missing", {"cpu": "because", "cuda": "because"})
    arguments = (*(t.detach() for t in random_inputs()), *PARAMETERS, False)
    with pytest.warns(UserWarning, match="because; run `pip install"):
        _ops._forward_fallback(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ops._forward_fallback(*arguments)


@pytest.mark.parametrize(
    "record, library, message",
    [
        (None, b"", "stopped half-way"),
        ({"torch": "1.0"}, b"", "built for torch 1.0"),
        ({}, b"no library", "do not load"),
        ({}, None, "do not load"),
    ],
)
def test_a_build_that_does_not_fit_is_said_and_not_used(tmp_path, monkeypatch, record, library, message):
    monkeypatch.setattr(_extension, "_kernels", ())
    monkeypatch.setattr(_extension, "_missing", {})
    if record is not None:
        complete = {**_extension.describe_torch(), "kernels": ["cpu"], "missing": {"cuda": "no nvcc"}, **record}
        (tmp_path / "_build.json").write_text(json.dumps(complete))
    if library is not None:
        (tmp_path / "_C.so").write_bytes(library)
    with pytest.warns(UserWarning, match=message) as said:
        _extension.load(tmp_path)
    assert "pip install" in str(said[0].message)
    assert _extension.kernels() == ()
    assert message in _extension.why_not("cpu")
    assert "pip install" in _extension.why_not("cuda")


on_a_gpu = pytest.mark.skipif("cuda" not in kernels() or not torch.cuda.is_available(), reason="no GPU, or no kernels")


@on_a_gpu
def test_cuda_graph_capture_and_other_stream():
    inputs = random_inputs(dtype=torch.float32, device="cuda")

    def step():
        output = dcnv3(*inputs, group=3)
        return output, torch.autograd.grad(output.sum(), inputs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs[0].data.mul_(2)
    graph.replay()
    torch.testing.assert_close(captured, step())


@on_a_gpu
def test_memory_is_that_of_the_tensors_and_one_accumulator():
    inputs = random_inputs(n=4, h=28, w=28, group=14, width=16, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(inputs[0]).detach()
    torch.autograd.grad(dcnv3(*inputs, group=14), inputs, grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    gradients = torch.autograd.grad(dcnv3(*inputs, group=14), inputs, grad)
    new = [grad, *gradients]  # the output is as large as its gradient
    allowed = sum(t.numel() * t.element_size() for t in new) + inputs[0].numel() * 4
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before <= allowed


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU at most")
def test_a_device_other_than_the_current_one():
    inputs = random_inputs(dtype=torch.float64)
    elsewhere = [t.detach().to("cuda:1") for t in inputs]
    with torch.cuda.device(0):
        got = results(dcnv3, elsewhere, group=3)
    assert all(t.device == torch.device("cuda:1") for t in got)
    assert_same([t.cpu() for t in got], results(dcnv3, inputs, group=3), rtol=0, atol=1e-12)
