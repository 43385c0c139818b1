"""First derivatives backwards, for the operator and for its definition alike; every other derivative is an error."""

import torch
from torch.autograd import forward_ad


def _refuse_tangents(arguments):
    """Below autograd nobody looks at them: they would become zeros in silence."""
    if any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments):
        raise NotImplementedError(
            "dcnv3: derivatives in forward mode (jvp, jacfwd, hessian) are not implemented; "
            "torch.autograd.grad and torch.autograd.functional.jacobian go backwards"
        )


def differentiable(forward, backward):
    """`forward(input, offset, mask, *parameters)` whose gradient is `backward(grad_output, *the same)`."""

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            ctx.save_for_backward(*arguments[:3])
            ctx.parameters = arguments[3:]
            return forward(*arguments)

        @staticmethod
        def backward(ctx, grad_output):
            return *backward(grad_output, *ctx.saved_tensors, *ctx.parameters), *(None for _ in ctx.parameters)

    def apply(*arguments):
        _refuse_tangents(arguments)
        return Forward.apply(*arguments)

    return apply


def not_differentiable(function):
    """`function` with an error where autograd would differentiate it."""

    class Last(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            return function(*arguments)

        @staticmethod
        def backward(ctx, *gradients):
            raise NotImplementedError(
                "dcnv3: the gradient of the gradient is not implemented (create_graph=True needs it)"
            )

    def apply(*arguments):
        _refuse_tangents(arguments)
        return Last.apply(*arguments)

    return apply
