"""`dcnv3::forward` and `dcnv3::backward`: the schema, and what runs behind it.

Where compiled kernels are loaded (see `_extension.py`) the dispatcher takes them for their device.
For every other device there is the definition in PyTorch. Both have the same fake kernels and the
same gradient. Arguments are checked by :func:`dcnv3.dcnv3`, not here.
"""

import warnings

import torch

from . import _extension, definition
from ._autograd import differentiable, not_differentiable

_PARAMETERS = (
    "int group, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "float offset_scale, bool remove_center, bool softmax"
)
_library = torch.library.Library("dcnv3", "DEF")  # declarations vanish with their Library object
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_FORWARD = f"Tensor input, Tensor offset, Tensor mask, {_PARAMETERS}) -> Tensor"
_BACKWARD = f"Tensor grad_output, Tensor input, Tensor offset, Tensor mask, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)"
_library.define(f"forward({_FORWARD}", tags=_TAGS)
_library.define(f"backward({_BACKWARD}", tags=_TAGS)
# What the CUDA kernels call on a GPU that cannot run them, `why` being CUDA's reason.
_library.define(f"_forward_without_kernels(str why, {_FORWARD}")
_library.define(f"_backward_without_kernels({_BACKWARD}")

_said = set()


def _say_slow(device, why):
    """Once a device: the definition runs because nothing better is there."""
    if device not in _said:
        _said.add(device)
        warnings.warn(
            f"dcnv3: the operator runs in plain PyTorch on {device}, several times slower than its kernels: {why}",
            stacklevel=2,
        )


def _forward_fallback(input, *args):
    _say_slow(input.device.type, _extension.why_not(input.device.type))
    return definition.forward(input, *args)


def _backward_fallback(grad_output, *args):
    return definition.backward(grad_output, *args)


def _forward_without_kernels(why, input, *args):
    capability = torch.cuda.get_device_capability(input.device)
    _say_slow(str(input.device), _extension.why_not_on(capability, why))
    return definition.forward(input, *args)


_library.impl("forward", _forward_fallback, "CompositeExplicitAutograd")
_library.impl("backward", _backward_fallback, "CompositeExplicitAutograd")
_library.impl("_forward_without_kernels", _forward_without_kernels, "CompositeExplicitAutograd")
_library.impl("_backward_without_kernels", _backward_fallback, "CompositeExplicitAutograd")


@torch.library.register_fake("dcnv3::forward", lib=_library)
def _forward_fake(input, offset, mask, *parameters):
    return input.new_empty((*offset.shape[:3], input.shape[3]))


@torch.library.register_fake("dcnv3::backward", lib=_library)
def _backward_fake(grad_output, input, offset, mask, *parameters):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (input, offset, mask))


def _below_autograd(operator):
    def call(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return call


_forward, _backward = torch.ops.dcnv3.forward.default, torch.ops.dcnv3.backward.default
_library.impl("forward", differentiable(_below_autograd(_forward), _backward), "Autograd")
_library.impl("backward", not_differentiable(_below_autograd(_backward)), "Autograd")

_extension.load()
