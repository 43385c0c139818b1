"""Attention pooling of InternImage-H and -G (the CLIP projector of the published models)."""

import torch
import torch.nn.functional as F
from torch import nn


class CrossAttention(nn.Module):
    """Multi-head attention of queries [N, Q, dim] over keys and values [N, T, dim] -> [N, Q, out_dim].

    The biases of q, k and v are parameters of their own: their published names are `q_bias`, ....
    """

    def __init__(self, dim, heads, out_dim):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.k_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, query, key, value):
        def heads(x, layer, bias):
            return F.linear(x, layer.weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            heads(query, self.q, self.q_bias), heads(key, self.k, self.k_bias), heads(value, self.v, self.v_bias)
        )
        return self.proj(out.transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """One query, the mean token, attends to all tokens: [N, T, dim] -> [N, out_dim]."""

    def __init__(self, dim, *, heads, out_dim, norm_eps):
        super().__init__()
        self.norm1_q = nn.Sequential(nn.LayerNorm(dim, eps=norm_eps))
        self.norm1_k = nn.Sequential(nn.LayerNorm(dim, eps=norm_eps))
        self.norm1_v = nn.Sequential(nn.LayerNorm(dim, eps=norm_eps))
        self.cross_dcn = CrossAttention(dim, heads, out_dim)

    def forward(self, tokens):
        query = self.norm1_q(tokens.mean(1, keepdim=True))
        return self.cross_dcn(query, self.norm1_k(tokens), self.norm1_v(tokens)).squeeze(1)
