"""The attention module: one projection, heads normalised and rotated in place, one read of the KV.

transformers' own spends some fifty small tensor operations per layer on the same arithmetic; with
weights streaming through the caches between them, that was 15 % of a decoding step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvkeep.models.leaf import Leaf, Packing, Shape
from kvkeep.ops.layout import Heads

QKV = ("q_proj", "k_proj", "v_proj")


class KVAttention(Protocol):
    """A step's KV cache, as the model sees it."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v [T, Hkv, D] (rotated; rows may be strided, the last dimension is dense)."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Return [T, Hq, D] for q [T, Hq, D]; the scale is 1 / sqrt(D)."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What an attention module's tensors don't say."""

    layer: int
    head_dim: int
    norm_eps: float
    """Of the query and key norms, where there are any."""


class SelfAttention(Leaf):
    """Projects, rotates, appends and attends one layer's rows."""

    def __init__(self, packing: Packing, shapes: dict[str, Shape], geometry: Geometry) -> None:
        super().__init__(shapes)
        self._packing = packing
        self._ops = packing.ops
        self._geometry = geometry
        self._inner, self._hidden = shapes["q_proj.weight"]

    def build(self, tensors: dict[str, Tensor]) -> None:
        """Pack the three input projections as one weight, and the output's."""
        joined = torch.cat([tensors[f"{name}.weight"] for name in QKV])
        self._qkv = self._packing.pack(joined)
        self._bias = self._joined_bias(tensors, joined)
        self._out = self._packing.pack(tensors["o_proj.weight"])
        out_bias = tensors.get("o_proj.bias")
        self._out_bias = None if out_bias is None else out_bias.clone()
        dim = self._geometry.head_dim
        q_norm, k_norm = tensors.get("q_norm.weight"), tensors.get("k_norm.weight")
        self._heads = Heads(
            num_q_heads=self._inner // dim,
            num_kv_heads=len(tensors["k_proj.weight"]) // dim,
            head_dim=dim,
            q_norm=None if q_norm is None else q_norm.clone(),
            k_norm=None if k_norm is None else k_norm.clone(),
            eps=self._geometry.norm_eps,
        )
        norms = 0 if q_norm is None or k_norm is None else q_norm.nbytes + k_norm.nbytes
        self.read_bytes = self._qkv.nbytes + self._out.nbytes + norms

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        kv: KVAttention,
        **_unused: object,
    ) -> tuple[Tensor, None]:
        """Return [1, T, K] for rows [1, T, K]; which tokens a row sees is the step's plan's."""
        layer, heads = self._geometry.layer, self._heads
        cos, sin = position_embeddings
        qkv = self._ops.linear(hidden_states.view(-1, self._hidden), self._qkv, self._bias)
        self._ops.rotate_heads(qkv, heads, cos[0], sin[0])
        q, k, v = heads.split(qkv)
        kv.append(layer, k, v)
        attended = kv.attend(layer, q).view(-1, self._inner)
        return self._ops.linear(attended, self._out, self._out_bias).unsqueeze(0), None

    @staticmethod
    def _joined_bias(tensors: dict[str, Tensor], like: Tensor) -> Tensor | None:
        biases = {name: tensors.get(f"{name}.bias") for name in QKV}
        if all(bias is None for bias in biases.values()):
            return None
        sizes = [len(tensors[f"{name}.weight"]) for name in QKV]
        return torch.cat(
            [
                like.new_zeros(size) if bias is None else bias
                for size, bias in zip(sizes, biases.values(), strict=True)
            ]
        )
