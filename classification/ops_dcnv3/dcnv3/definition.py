"""DCNv3 in plain PyTorch: the definition, the oracle of the compiled kernels, and the last resort.

The operator is that of InternImage (Wang et al., CVPR 2023, arXiv:2211.05778, section 3.1): every
output pixel of every group sums `P` bilinear samples of the input, each weighted by its own mask
value, at positions given by a kernel grid plus learnt offsets.

Positions are integers plus a bilinear fraction here, not the normalised coordinates of
`grid_sample`: those round, and at zero offsets (a fresh model) the rounding moves a sample to the
neighbouring cell, where its offset gradient is another one. At an integer position the cell is
the one of `floor`, as in the published kernel.

Memory: the points are taken one after the other and recomputed in the backward pass, so that
nothing of size `P` times the output is ever kept.

:func:`forward` and :func:`backward` take the arguments of the operators `dcnv3::forward` and
`dcnv3::backward`, in their order.
"""

import torch
import torch.nn.functional as F

from ._autograd import differentiable, not_differentiable


def kernel_points(kernel, remove_center):
    """(i, j) = (column, row) of every point in the published order: columns outside, rows inside."""
    kernel_h, kernel_w = kernel
    center = (kernel_w // 2, kernel_h // 2)
    points = [(i, j) for i in range(kernel_w) for j in range(kernel_h)]
    return [p for p in points if not (remove_center and p == center)]


def _compute_dtype(dtype):
    """Coordinates and sums are float32 at least: bfloat16 cannot hold a position of 200.5."""
    return torch.promote_types(dtype, torch.float32)


class _Sampler:
    """Where the points of one call lie: the part that forward and backward share.

    rows are the input seen as a table [N*H*W*G, D]: one row a pixel and group.
    """

    def __init__(
        self, input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, softmax
    ):
        self.points = kernel_points(kernel, remove_center)
        batch, self.height, self.width, channels = input.shape
        out_h, out_w = offset.shape[1:3]
        self.shape = (batch, out_h, out_w, group)
        self.dtype = _compute_dtype(input.dtype)
        self.rows = input.to(self.dtype).reshape(-1, channels // group)
        self.offset = offset.reshape(*self.shape, len(self.points), 2)
        self.mask = mask.reshape(*self.shape, len(self.points)).to(self.dtype)
        self.softmax = softmax
        if softmax:
            self.mask = self.mask.softmax(-1)
        self.dilation, self.offset_scale = dilation, offset_scale

        # The kernel's centre for every output column and row: where point (0, 0) would sample
        # without an offset is `origin`, and offset_scale stretches the grid around the centre.
        def origin(size, k, s, p, d):
            extent = (d * (k - 1)) // 2
            steps = torch.arange(size, device=input.device, dtype=self.dtype)
            return extent - p + steps * s - extent * offset_scale

        self.origin_x = origin(out_w, kernel[1], stride[1], padding[1], dilation[1]).view(1, 1, -1, 1)
        self.origin_y = origin(out_h, kernel[0], stride[0], padding[0], dilation[0]).view(1, -1, 1, 1)

        # Row number of pixel (0, 0) of every image and group.
        image = torch.arange(batch, device=input.device).view(-1, 1, 1, 1) * (self.height * self.width * group)
        self.base = image + torch.arange(group, device=input.device)
        self.group = group

    def corners(self, p):
        """Point p: row numbers [M, 4], and their bilinear weights with derivatives, each [M, 4].

        M = N*Ho*Wo*G. A corner outside the input has weight and derivatives 0 and points to a row
        that exists. The derivatives are with respect to the position (x, y) in pixels.
        """
        i, j = self.points[p]
        offset = self.offset[..., p, :].to(self.dtype)
        x = self.origin_x + (i * self.dilation[1] + offset[..., 0]) * self.offset_scale
        y = self.origin_y + (j * self.dilation[0] + offset[..., 1]) * self.offset_scale
        # False for NaN as well: a point that is nowhere samples nothing.
        inside = (x > -1) & (x < self.width) & (y > -1) & (y < self.height)
        x, y = x.where(inside, 0), y.where(inside, 0)
        x0, y0 = x.floor(), y.floor()
        fx, fy = x - x0, y - y0
        x0, y0 = x0.long(), y0.long()

        one = torch.ones_like(fx)
        index, weight, weight_dx, weight_dy = [], [], [], []
        for dy, wy, sign_y in ((0, 1 - fy, -one), (1, fy, one)):
            for dx, wx, sign_x in ((0, 1 - fx, -one), (1, fx, one)):
                cx, cy = x0 + dx, y0 + dy
                valid = inside & (cx >= 0) & (cx < self.width) & (cy >= 0) & (cy < self.height)
                pixel = cy.clamp(0, self.height - 1) * self.width + cx.clamp(0, self.width - 1)
                index.append(self.base + pixel * self.group)
                weight.append((wx * wy).where(valid, 0))
                weight_dx.append((sign_x * wy).where(valid, 0))
                weight_dy.append((sign_y * wx).where(valid, 0))
        return tuple(torch.stack(t, -1).view(-1, 4) for t in (index, weight, weight_dx, weight_dy))

    def mask_column(self, p):
        """Mask values of point p: [M, 1]."""
        return self.mask[..., p].reshape(-1, 1)


def forward(input, offset, mask, *parameters):
    """[N, Ho, Wo, G*D] in the input's dtype."""
    sampler = _Sampler(input, offset, mask, *parameters)
    batch, out_h, out_w, group = sampler.shape
    output = sampler.rows.new_zeros(batch * out_h * out_w * group, sampler.rows.shape[1])
    if output.numel() > 0:  # embedding_bag refuses an empty table
        for p in range(len(sampler.points)):
            index, weight, _, _ = sampler.corners(p)
            # A bag is one sample: the weighted sum of its four rows, without a copy of them.
            output += F.embedding_bag(
                index, sampler.rows, mode="sum", per_sample_weights=weight * sampler.mask_column(p)
            )
    return output.view(batch, out_h, out_w, input.shape[-1]).to(input.dtype)


def backward(grad_output, input, offset, mask, *parameters):
    """The gradients of input, offset and mask, in their shapes and dtypes."""
    sampler = _Sampler(input, offset, mask, *parameters)
    rows = sampler.rows
    grad = grad_output.to(sampler.dtype).reshape(-1, rows.shape[1])
    grad_rows = torch.zeros_like(rows)
    grad_offset = torch.empty(sampler.offset.shape, dtype=sampler.dtype, device=input.device)
    grad_mask = torch.empty(sampler.mask.shape, dtype=sampler.dtype, device=input.device)
    for p in range(len(sampler.points)):
        index, weight, weight_dx, weight_dy = sampler.corners(p)
        mask_p = sampler.mask_column(p)
        # dot[m, c] = <output gradient, corner c>: all three small gradients follow from it.
        dot = torch.empty_like(weight)
        for c in range(4):
            dot[:, c] = (rows.index_select(0, index[:, c]) * grad).sum(-1)
            share = weight[:, c : c + 1] * mask_p
            # A corner of weight 0 gets nothing, whatever the output gradient is.
            grad_rows.index_add_(0, index[:, c], (grad * share).where(share != 0, 0))
        scale = mask_p[:, 0] * sampler.offset_scale
        grad_mask[..., p] = (dot * weight).sum(-1).view(sampler.shape)
        grad_offset[..., p, 0] = ((dot * weight_dx).sum(-1) * scale).view(sampler.shape)
        grad_offset[..., p, 1] = ((dot * weight_dy).sum(-1) * scale).view(sampler.shape)
    if sampler.softmax:
        grad_mask = sampler.mask * (grad_mask - (grad_mask * sampler.mask).sum(-1, keepdim=True))
    return (
        grad_rows.view(input.shape).to(input.dtype),
        grad_offset.view(offset.shape).to(offset.dtype),
        grad_mask.view(mask.shape).to(mask.dtype),
    )


# The same with a gradient, for :func:`dcnv3.reference`.
differentiable_forward = differentiable(forward, not_differentiable(backward))
