"""The DCNv3 layer of InternImage with the parameter names of the published checkpoints."""

import torch
from torch import nn

from .functional import dcnv3


class ToChannelsFirst(nn.Module):
    """[N, H, W, C] -> [N, C, H, W], a view."""

    def forward(self, x):
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    """[N, C, H, W] -> [N, H, W, C], a view."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class DCNv3(nn.Module):
    """Deformable convolution v3: [N, H, W, channels] -> [N, H, W, channels].

    Offsets and masks come from a depthwise convolution of the input (InternImage,
    arXiv:2211.05778, figure 3 and section 3.1).

    Args:
        channels: a multiple of `group`.
        group: groups with offsets and masks of their own; 16 channels each in InternImage T to XL.
        kernel_size: side of the sampling grid; the padding keeps the size of the input.
        dw_kernel_size: side of the depthwise convolution (odd), `kernel_size` by default.
        offset_scale: stretches sampling grid and offsets (2.0 in InternImage L and XL).
        center_feature_scale: mix the projected input back in, by a learnt weight per group (H, G).
        remove_center: leave the middle sampling point out.
        norm_eps: epsilon of the LayerNorm behind the depthwise convolution.
    """

    def __init__(
        self,
        channels,
        group,
        *,
        kernel_size=3,
        dw_kernel_size=None,
        offset_scale=1.0,
        center_feature_scale=False,
        remove_center=False,
        norm_eps=1e-6,
    ):
        super().__init__()
        if channels % group:
            raise ValueError(f"DCNv3: {channels} channels do not divide into {group} groups")
        if kernel_size % 2 == 0:
            raise ValueError(f"DCNv3: kernel_size must be odd to keep the size of the input, got {kernel_size}")
        self.channels, self.group = channels, group
        self.kernel_size, self.offset_scale, self.remove_center = kernel_size, offset_scale, remove_center
        self.points = kernel_size * kernel_size - int(remove_center)

        dw_kernel_size = dw_kernel_size or kernel_size
        # The index of every submodule is part of the published parameter names (dw_conv.0, dw_conv.1.1).
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=channels),
            nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=norm_eps)),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, group * self.points * 2)
        self.mask = nn.Linear(channels, group * self.points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.center_feature_scale = center_feature_scale
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))
        self.reset_parameters()

    def reset_parameters(self):
        """The published start: a regular grid of equal weights, projections by Xavier."""
        for layer in (self.offset, self.mask):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _offset_and_logits(self, features):
        """[N, H, W, C] -> offsets [N, H, W, G*P*2] and mask logits [N, H, W, G*P].

        Both projections are one matrix product. Its width is rounded up to a multiple of 8, because
        odd ones (63 rows at 7 groups) are slow in 16 bits; the results are slices of it, which the
        operator reads in place.
        """
        weights, biases = [self.offset.weight, self.mask.weight], [self.offset.bias, self.mask.bias]
        sizes = [len(bias) for bias in biases]
        spare = -sum(sizes) % 8
        if spare:
            weights.append(weights[0].new_zeros(spare, self.channels))
            biases.append(biases[0].new_zeros(spare))
        both = nn.functional.linear(features, torch.cat(weights), torch.cat(biases))
        # Not by slices: each would bring back a gradient as wide as `both`, mostly zeros, to be added up.
        return both.split([*sizes, spare], -1)[:2]

    def forward(self, x):
        features = self.dw_conv(x.permute(0, 3, 1, 2))  # [N, H, W, C]
        projected = self.input_proj(x)
        offset, logits = self._offset_and_logits(features)
        pad = self.kernel_size // 2
        y = dcnv3(
            projected,
            offset,
            logits,
            group=self.group,
            kernel=(self.kernel_size, self.kernel_size),
            padding=(pad, pad),
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            mask_is_logits=True,
        )
        if self.center_feature_scale:
            scale = nn.functional.linear(
                features, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            ).sigmoid()
            scale = scale.repeat_interleave(self.channels // self.group, dim=-1)
            y = y * (1 - scale) + projected * scale
        return self.output_proj(y)
