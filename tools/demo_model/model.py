"""Llama-like decoder with the parameter names and layouts of transformers' LlamaForCausalLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; the head dimension is 64."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    inner: int = 704
    head_dim: int = 64
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    positions: int = 4096


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normed `x` of any leading shape."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in halves: x is [B, H, T, D], cos and sin are [T, D/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    """Causal attention with fewer KV heads than query heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of x [B, T, hidden] over itself."""
        b, t, _ = x.shape
        h, kv, d = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        q = rotate(self.q_proj(x).view(b, t, h, d).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, t, kv, d).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, kv, d).transpose(1, 2)
        k, v = k.repeat_interleave(h // kv, 1), v.repeat_interleave(h // kv, 1)
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(b, t, h * d))
        return out


class MLP(nn.Module):
    """Gated feed-forward block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward of x [B, T, hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each on a normed residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The layer applied to x [B, T, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Llama(nn.Module):
    """The network; its head is the embedding table."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.model = shape, Trunk(shape)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes = "o_proj" in name or "down_proj" in name
                nn.init.normal_(p, std=0.02 / (2 * shape.layers) ** 0.5 if writes else 0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states [B, T, hidden] of ids [B, T]."""
        d = self.shape.head_dim
        inverse = self.shape.rope_theta ** (-torch.arange(0, d, 2).float() / d)
        angle = torch.arange(ids.shape[1]).float()[:, None] * inverse[None]
        cos, sin = angle.cos(), angle.sin()
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        return F.linear(hidden, self.model.embed_tokens.weight)


def spread_rows(table: Tensor, used: Tensor, seed: int) -> None:
    """Redraw the rows of tokens never seen so far from the Gaussian of the rows in use.

    A softmax only ever pushes unseen tokens away, so their rows end in one direction; copying
    then breaks at once when they come in. Rows spread like the used ones keep it.
    """
    gen = torch.Generator().manual_seed(seed)
    unseen = torch.ones(len(table), dtype=torch.bool)
    unseen[used] = False
    x = table[used]
    mean = x.mean(0)
    noise = torch.randn(int(unseen.sum()), len(used), generator=gen)
    table[unseen] = mean + noise @ (x - mean) / len(used) ** 0.5
