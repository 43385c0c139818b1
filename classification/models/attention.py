"""A query per label over the last feature maps (MODEL.HEAD label_attention). The images of a study as one answer: the
mean or the largest of their logits (MODEL.FUSION mean, max), or the mean and what such queries find in all of them
(attention)."""

import torch
from torch import nn

from common.studies import VIEWS, as_studies
from models.classifier import Classifier

HEAD_WIDTH = 32  # channels of one attention head
# Beside PyTorch's own attention it has kernels for evaluation alone, whose products no counter sees and no graph holds.
torch.backends.mha.set_fastpath_enabled(False)


class Labels(Classifier):
    """What each label asks for (`query`), and how its answer becomes its logit: [N, L, width] -> [N, L]."""

    def __init__(self, width, labels):
        super().__init__(width, labels)
        self.query = nn.Parameter(torch.randn(labels, width))

    def forward(self, answers):
        with torch.autocast(answers.device.type, enabled=False):
            return (answers.to(self.weight.dtype) * self.weight).sum(-1) + self.bias


class LabelAttention(nn.Module):
    """Query2Label (Liu et al. 2021) without attention among the queries, as ML-Decoder (Ridnik et al. 2023) without
    groups: feature maps [N, features, h, w] -> logits [N, labels]."""

    def __init__(self, features, labels, *, width, drop=0.0):
        super().__init__()
        self.project, self.norm0 = nn.Linear(features, width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, width // HEAD_WIDTH, drop, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(drop), nn.Linear(4 * width, width))
        self.labels = Labels(width, labels)

    def tokens(self, maps):
        return self.project(maps.flatten(2).transpose(1, 2))  # [N, h w, width]

    def _answers(self, tokens, padding=None, **keywords):
        tokens = self.norm0(tokens)
        query = self.labels.query.to(tokens.dtype).repeat(tokens.shape[0], 1, 1)
        return query, *self.attention(query, tokens, tokens, key_padding_mask=padding, **keywords)

    def logits(self, tokens, padding=None):
        """padding: the tokens that are none [N, T], or None."""
        query, answers, _ = self._answers(tokens, padding, need_weights=False)
        answers = self.norm1(query + answers)
        return self.labels(self.norm2(answers + self.mlp(answers)))

    def forward(self, maps):
        return self.logits(self.tokens(maps))

    def maps(self, maps):
        """How much each label attends to each position, mean of the heads: [N, labels, h, w], of sum 1."""
        weights = self._answers(self.tokens(maps))[2]  # [N, L, h w]
        return weights.unflatten(2, maps.shape[2:])


class StudyAttention(LabelAttention):
    """A transformer over the positions of all images of a study, each with an embedding of its view, before the queries
    (CheXFusion, Kim 2023). At first its logits are 0."""

    def __init__(self, features, labels, *, width, layers, drop=0.0):
        super().__init__(features, labels, width=width, drop=drop)
        self.view = nn.Embedding(len(VIEWS), width)
        heads = width // HEAD_WIDTH
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, drop, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():  # its layers are copies of one
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for parameter in (self.view.weight, self.labels.weight, self.labels.bias):
            nn.init.zeros_(parameter)

    def forward(self, maps, view, rows):
        tokens = (self.tokens(maps) + self.view(view)[:, None])[rows.clamp(min=0)].flatten(1, 2)
        padding = (rows < 0).repeat_interleave(maps.shape[2] * maps.shape[3], 1)
        return self.logits(self.encoder(tokens, src_key_padding_mask=padding), padding)


class Around(nn.Module):
    """A model made of a backbone (see `models/build.py`) and what comes after it."""

    def __init__(self, backbone, uses=()):
        super().__init__()
        self.backbone, self.uses = backbone, backbone.uses | {*uses}
        self.classifier = f"backbone.{backbone.classifier}"

    @property
    def blocks(self):  # none where the backbone has none
        return self.backbone.blocks

    def own_keys(self):
        """Names of its state that are not the backbone's."""
        return [name for name in self.state_dict() if not name.startswith("backbone.")]

    def lr_scales(self, decay):
        return {f"backbone.{prefix}": scale for prefix, scale in self.backbone.lr_scales(decay).items()}

    @property
    def undecayed(self):
        of_backbone = {f"backbone.{name}" for name in getattr(self.backbone, "undecayed", ())}
        return of_backbone | {name for name in self.own_keys() if name.endswith((".labels.query", ".view.weight"))}

    @property
    def feature_maps(self):  # none where the backbone has none
        return self.backbone.feature_maps


USED = ("MODEL.DROP_RATE", "TRAIN.BACKBONE_LR_SCALE")


class Attended(Around):
    """A backbone's last feature maps under a :class:`LabelAttention`.

    used: names of the backbone's parameters that the maps depend on; the others (its own pooling and classifier) do
    not train.
    """

    def __init__(self, backbone, used, label_attention):
        super().__init__(backbone, USED)
        self.label_attention, self.classifier = label_attention, "label_attention.labels"
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name in used)

    def forward(self, images):
        return self.classify(self.feature_maps(images))

    def classify(self, maps):
        return self.label_attention(maps)

    def attention_maps(self, maps):
        """See :meth:`LabelAttention.maps`."""
        return self.label_attention.maps(maps)


# MODEL.FUSION -> function(logits of a study's images [B, V, L], which of them are there [B, V, 1]) -> [B, L].
POOLINGS = {
    "mean": lambda logits, there: logits.where(there, 0).sum(1) / there.sum(1),
    "max": lambda logits, there: logits.where(there, -torch.inf).amax(1),
}


class Pooled(Around):
    """The logits that a model has of each image of a study, as one by a row of POOLINGS."""

    def __init__(self, backbone, fusion, uses=()):
        super().__init__(backbone, uses)
        self.pool = POOLINGS[fusion]

    @property
    def attention_maps(self):  # none where the backbone has none
        of_images = self.backbone.attention_maps
        return lambda maps, view=None, rows=None: of_images(maps)

    def _fuse(self, logits, rows):
        return self.pool(logits[rows.clamp(min=0)], (rows >= 0)[..., None])

    def forward(self, batch):
        """Images [N, 3, S, S] -> logits [N, L], or :class:`Studies` of B studies -> [B, L]."""
        batch = as_studies(batch)
        return self._fuse(self.backbone(batch.images), batch.rows)

    def classify(self, maps, view=None, rows=None):
        logits = self.backbone.classify(maps)
        return self._fuse(logits, as_studies(logits).rows if rows is None else rows)


class Fused(Pooled):
    """The mean of the logits of a study's images, and the logits of a :class:`StudyAttention` added to it: so it starts
    as the mean."""

    def __init__(self, backbone, study_attention):
        super().__init__(backbone, "mean", USED)
        self.study_attention, self.classifier = study_attention, "study_attention.labels"

    def forward(self, batch):
        batch = as_studies(batch)
        return self.classify(self.feature_maps(batch.images), batch.view, batch.rows)

    def classify(self, maps, view=None, rows=None):
        if rows is None:
            _, view, rows = as_studies(maps)
        return super().classify(maps, view, rows) + self.study_attention(maps, view, rows)
