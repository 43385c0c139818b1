"""InternImage (Wang et al., CVPR 2023, arXiv:2211.05778) with the published parameter names.

Variants differ in the arguments of :class:`InternImage` only; `configs/` holds those of T, S, B, L,
XL, H and G (table 1 of the paper and the configurations of the published models).
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from dcnv3 import DCNv3
from dcnv3.module import ToChannelsFirst, ToChannelsLast
from models.batch_norm import BatchNorm
from models.classifier import Classifier
from models.clip_head import AttentionPool

NORM_EPS = 1e-6


def _norm_sequential(channels, *before, after=()):
    """A LayerNorm in a Sequential: its index is part of the published names (norm1.0, norm2.1)."""
    return nn.Sequential(*before, nn.LayerNorm(channels, eps=NORM_EPS), *after)


class Stem(nn.Module):
    """Image to tokens at a quarter of the size: [N, 3, H, W] -> [N, H/4, W/4, C]."""

    def __init__(self, in_channels, channels):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, half, 3, stride=2, padding=1)
        self.norm1 = _norm_sequential(half, ToChannelsLast(), after=(ToChannelsFirst(),))
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(half, channels, 3, stride=2, padding=1)
        self.norm2 = _norm_sequential(channels, ToChannelsLast())

    def forward(self, x):
        # From here on all tensors are channels-last: no layer converts the layout.
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """Half the size, twice the channels: [N, H, W, C] -> [N, H/2, W/2, 2C]."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = _norm_sequential(2 * channels, ToChannelsLast())

    def forward(self, x):
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class DropPath(nn.Module):
    """In training, zeroes a branch for some images of the batch and scales up the others (Huang et al. 2016)."""

    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, x):
        if not self.training or self.probability == 0:
            return x
        kept = 1 - self.probability
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(kept).div_(kept or 1)


class MLP(nn.Module):
    def __init__(self, channels, hidden, drop):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """DCNv3 and MLP, each with a residual connection, on [N, H, W, C].

    The norm is before the branch (pre-norm), after it (`post_norm`: S, B, L, XL, G) or on both
    sides (`res_post_norm`: H).
    """

    def __init__(
        self, channels, group, *, drop_path, drop=0.0, mlp_ratio=4.0, layer_scale=None, post_norm=False,
        res_post_norm=False, **dcn,
    ):  # fmt: skip
        super().__init__()
        self.post_norm, self.res_post_norm = post_norm, res_post_norm
        self.norm1 = _norm_sequential(channels)
        self.dcn = DCNv3(channels, group, norm_eps=NORM_EPS, **dcn)
        self.norm2 = _norm_sequential(channels)
        self.mlp = MLP(channels, int(channels * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(layer_scale * torch.ones(channels))
            self.gamma2 = nn.Parameter(layer_scale * torch.ones(channels))
        if res_post_norm:
            self.res_post_norm1 = _norm_sequential(channels)
            self.res_post_norm2 = _norm_sequential(channels)

    def _branch(self, x, function, norm, res_post_norm, gamma):
        y = norm(function(x)) if self.post_norm else function(norm(x))
        if self.res_post_norm:
            y = res_post_norm(y)
        if gamma is None:
            return x + self.drop_path(y)
        # Stochastic depth on the small factor instead of on the map: one pass less over it, forward and backward.
        scale = self.drop_path(gamma.expand(y.shape[0], 1, 1, -1)) if self.training else gamma
        return x + scale * y

    def forward(self, x):
        norms = (self.res_post_norm1, self.res_post_norm2) if self.res_post_norm else (None, None)
        x = self._branch(x, self.dcn, self.norm1, norms[0], self.gamma1)
        return self._branch(x, self.mlp, self.norm2, norms[1], self.gamma2)


class Level(nn.Module):
    """The blocks of one resolution; returns (result, result downsampled for the next level)."""

    def __init__(self, channels, group, *, drop_paths, downsample, norm, extra_norm_after, **block):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, group, drop_path=rate, **block) for rate in drop_paths)
        self.norm = _norm_sequential(channels) if norm else None
        self.extra_norm_after = list(extra_norm_after)
        if self.extra_norm_after:
            self.post_norms = nn.ModuleList(_norm_sequential(channels) for _ in self.extra_norm_after)
        self.downsample = Downsample(channels) if downsample else None

    def forward(self, x, use_checkpoint):
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if use_checkpoint else block(x)
            if i in self.extra_norm_after:
                x = self.post_norms[self.extra_norm_after.index(i)](x)
        if self.norm is not None:
            x = self.norm(x)
        return x, (self.downsample(x) if self.downsample is not None else None)


class InternImage(nn.Module):
    """InternImage classifier: [N, 3, H, W] -> logits [N, num_classes].

    Args:
        channels: C of the first level; each further level has twice as many.
        depths, groups: blocks and DCNv3 groups of the levels.
        level2_post_norm_block_ids: blocks of the third level followed by a norm of their own (H, G).
        use_clip_projector: pool by attention over the last two levels instead of by mean (H, G);
            image sides must then be multiples of 32.
        drop_rate, drop_path_rate: dropout, and stochastic depth of the last block.
        drop_path_type: stochastic depth rises linearly from 0, or is uniform.
        use_checkpoint: recompute blocks in the backward pass to save memory.
        block: the other arguments of :class:`Block` and of :class:`dcnv3.DCNv3`, which have the config's names in
            lower case. layer_scale: initial value of the learnt scale of each branch, None for none.
    """

    classifier = "head"
    uses = frozenset(
        ("MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "TRAIN.USE_CHECKPOINT", "TRAIN.LR_LAYER_DECAY",
         "TRAIN.OPTIMIZER.DCN_LR_MUL")
    )  # fmt: skip
    CLS_SCALE = 1.5  # width of the head's convolution relative to the last level
    CLIP_DIM = 1024

    def __init__(
        self,
        *,
        num_classes=1000,
        in_channels=3,
        channels=64,
        depths=(4, 4, 18, 4),
        groups=(4, 8, 16, 32),
        drop_rate=0.0,
        drop_path_rate=0.1,
        drop_path_type="linear",
        level2_post_norm_block_ids=(),
        use_clip_projector=False,
        use_checkpoint=False,
        **block,
    ):
        super().__init__()
        if len(depths) != 4 or len(groups) != 4:
            raise ValueError(f"InternImage has four levels: got depths {list(depths)} and groups {list(groups)}")
        self.depths, self.use_checkpoint, self.use_clip_projector = tuple(depths), use_checkpoint, use_clip_projector
        self.patch_embed = Stem(in_channels, channels)
        self.pos_drop = nn.Dropout(drop_rate)

        total = sum(depths)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        rates = rates if drop_path_type == "linear" else [drop_path_rate] * total
        self.levels = nn.ModuleList(
            Level(
                channels * 2**i,
                groups[i],
                drop_paths=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                downsample=i < 3,
                norm=not block.get("post_norm") or block.get("center_feature_scale"),
                extra_norm_after=level2_post_norm_block_ids if i == 2 else (),
                drop=drop_rate,
                **block,
            )
            for i in range(4)
        )

        last = channels * 8
        if use_clip_projector:
            self.dcnv3_head_x4 = nn.Sequential(nn.Conv2d(last, 4 * self.CLIP_DIM, 1), nn.PixelShuffle(2))
            self.dcnv3_head_x3 = nn.Conv2d(last // 2, self.CLIP_DIM, 1)
            self.clip_projector = AttentionPool(self.CLIP_DIM, heads=16, out_dim=768, norm_eps=NORM_EPS)
            features = 768
            self.fc_norm = _norm_sequential(features)
        else:
            features = int(last * self.CLS_SCALE)
            norm = nn.Sequential(BatchNorm(features))
            self.conv_head = nn.Sequential(nn.Conv2d(last, features, 1, bias=False), norm, nn.GELU())
        self.head = Classifier(features, num_classes)
        self._init_weights()

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Afterwards: the operator's Linears have a start of their own.
        for module in self.modules():
            if isinstance(module, DCNv3):
                module.reset_parameters()

    def feature_maps(self, x):
        """The last feature maps, before pooling: [N, 3, H, W] -> [N, F, h, w].

        T to XL: h = H/32, behind `conv_head`; H and G: h = H/16, what the CLIP projector attends to.
        """
        x = self.pos_drop(self.patch_embed(x))
        outputs = []
        for level in self.levels:
            output, x = level(x, self.use_checkpoint and self.training)
            outputs.append(output)
        third, fourth = (t.permute(0, 3, 1, 2) for t in outputs[-2:])
        if self.use_clip_projector:
            return self.dcnv3_head_x4(fourth) + self.dcnv3_head_x3(third)
        return self.conv_head(fourth)

    def classify(self, maps):
        """Logits of :meth:`feature_maps`: [N, F, h, w] -> [N, num_classes]."""
        if self.use_clip_projector:
            features = self.fc_norm(self.clip_projector(maps.flatten(2).transpose(1, 2)))
        else:
            features = maps.mean((2, 3))
        return self.head(features)

    def forward(self, x):
        return self.classify(self.feature_maps(x))

    def blocks(self):
        """What TRAIN.FSDP gathers one at a time."""
        return [part for level in self.levels for part in (*level.blocks, level.downsample) if part is not None]

    def lr_scales(self, decay):
        """Layer-wise learning rate decay: prefix of parameter names -> factor.

        As published: the last block has the full rate, the one before it `decay`, then its square, and so on backwards.
        The stem goes with the first block, the downsampling and the norm at a level's end with the block behind them.
        Names without a prefix here keep the full rate: the head, the last level's norm, and the `post_norms`.
        """
        blocks = [f"levels.{i}.blocks.{j}." for i, depth in enumerate(self.depths) for j in range(depth)]
        scales = {block: decay**k for k, block in enumerate(reversed(blocks))}
        scales["patch_embed."] = scales[blocks[0]]
        for i in range(3):
            for part in ("downsample", "norm"):
                scales[f"levels.{i}.{part}."] = scales[f"levels.{i + 1}.blocks.0."]
        return scales


def build(config):
    """The model that `config` describes (MODEL.TYPE intern_image).

    UserError: channels that do not divide into groups, or an image size that the CLIP projector cannot pool.
    """
    m = config.MODEL.INTERN_IMAGE
    if m.USE_CLIP_PROJECTOR and config.DATA.IMG_SIZE % 32:
        raise UserError(f"DATA.IMG_SIZE is {config.DATA.IMG_SIZE}; with the CLIP projector it must be a multiple of 32")
    for level, groups in enumerate(m.GROUPS):
        if groups < 1 or m.CHANNELS * 2**level % groups:
            raise UserError(
                f"MODEL.INTERN_IMAGE.GROUPS: level {level} has {m.CHANNELS * 2**level} channels, "
                f"which do not divide into {groups} groups"
            )
    normed = m.LEVEL2_POST_NORM_BLOCK_IDS or () if m.LEVEL2_POST_NORM else ()
    if normed and max(normed) >= m.DEPTHS[2]:
        raise UserError(
            f"MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS {list(normed)}: the third level has the blocks 0 to "
            f"{m.DEPTHS[2] - 1} (DEPTHS)"
        )
    return InternImage(
        num_classes=config.MODEL.NUM_CLASSES,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        drop_path_type=config.MODEL.DROP_PATH_TYPE,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        level2_post_norm_block_ids=normed,
        **{key.lower(): value for key, value in m.items() if not key.startswith("LEVEL2_POST_NORM")},
    )
