"""What a transform does to weights at load: values turned for nothing, and the size of masks.

Folded weights tell the key to whoever has the public ones: they stay in the process that computes,
and are never written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal

import torch

from kvkeep.ops.layout import HOST, Heads
from kvkeep.ops.turns import HeadTurns, TorchTurn

_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")

TurnsOf = Callable[[Literal["v"], int, Heads], HeadTurns]


class FoldValues:
    """Turns the rows of `v_proj` and the columns of `o_proj` by a layer's values' matrix B.

    V B comes out of the first, and the second takes P V B for P V, B being orthogonal.
    """

    def __init__(self, heads: Heads, turns: TurnsOf) -> None:
        self._heads = heads
        self._turns = turns
        self._turn = TorchTurn(HOST)

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a value's or the output's projection turned; any other tensor as it is."""
        found = _LAYER.fullmatch(name)
        part = "" if found is None else found[2]
        if found is None or not part.startswith(("self_attn.v_proj", "self_attn.o_proj.weight")):
            return tensor
        turns = self._turn.prepare(self._turns("v", int(found[1]), self._heads))
        dim = self._heads.head_dim
        if part == "self_attn.o_proj.weight":
            heads = tensor.view(len(tensor), -1, dim)
            return self._turn.turn_heads(heads, turns).view(tensor.shape)
        columns = tensor.view(len(tensor), -1).T.reshape(-1, self._heads.num_kv_heads, dim)
        turned = self._turn.turn_heads(columns, turns)
        return turned.view(len(columns), -1).T.reshape(tensor.shape).contiguous()


class KVSizes:
    """Hears of the weights as they pass, and says how large a layer's keys and values are.

    The hidden state before a projection has a root mean square of one, times the norm's weights.
    """

    def __init__(self) -> None:
        self._norms: dict[int, torch.Tensor] = {}
        self._parts: dict[tuple[int, str], torch.Tensor] = {}

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Remember what decides the size of keys and values; return the tensor as it is."""
        found = _LAYER.fullmatch(name)
        if found is not None:
            layer, part = int(found[1]), found[2].removeprefix("self_attn.")
            if part == "input_layernorm.weight":
                self._norms[layer] = tensor.double()
            elif part.startswith(("k_proj", "v_proj")) or part == "k_norm.weight":
                self._parts[layer, part] = tensor
        return tensor

    def of(self, role: Literal["k", "v"], layer: int, heads: Heads) -> torch.Tensor:
        """Return [Hkv] float64: the root mean square of a layer's keys or values."""
        normed = self._parts.get((layer, "k_norm.weight"))
        if role == "k" and normed is not None:
            return normed.double().square().mean().sqrt().repeat(heads.num_kv_heads)
        weight = self._parts[layer, f"{role}_proj.weight"].double() * self._norms[layer]
        squares = weight.square().sum(1)
        bias = self._parts.get((layer, f"{role}_proj.bias"))
        if bias is not None:
            squares = squares + bias.double().square()
        return squares.view(heads.num_kv_heads, -1).mean(1).sqrt()
