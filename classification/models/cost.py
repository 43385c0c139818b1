"""What a model costs: multiplications of one image, by torch's own counter."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dcnv3  # noqa: F401  (registers the operator)


def _dcnv3_flops(input_shape, offset_shape, mask_shape, *_parameters, out_shape=None, **_options):
    """Two a multiplication, as torch counts: four corners and one mask weight a sampling point and channel.

    The published count too: 5 x positions x points x channels (get_flops.py of InternImage).
    """
    batch, height, width, points_of_groups = mask_shape
    group, channels = _parameters[0], input_shape[3]
    return 2 * 5 * batch * height * width * (points_of_groups // group) * channels


@torch.no_grad()
def count_gmacs(model, size):
    """Billions of multiply-adds of convolutions, linear layers, attention and DCNv3 for one image [3, size, size].

    Norms, activations and pooling are not counted, as in published figures.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.dcnv3.forward: _dcnv3_flops})
    # Fused attention is counted on some devices only; the plain one consists of two products.
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, size, size, device=device))
    model.train(was_training)
    return counter.get_total_flops() / 2e9
