"""Leaf modules: what replaces a transformers model's own at load, under the same checkpoint names.

A leaf knows which checkpoint tensors it needs (`shapes`), takes them one by one (`fill`) and packs
itself when the last has come, so that hardly more than one leaf's tensors are held unpacked. Leaves
define `__call__` themselves: they carry no hooks, and a decoding step calls two hundred of them.
The bits of a row never depend on the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvkeep.ops.layout import HOST, LeafOps, PackedWeight

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packing:
    """How leaves pack their weights."""

    ops: LeafOps
    int8: bool = False
    device: torch.device = HOST
    """Where tensors are filled in from, and tables are kept."""

    def pack(self, weight: Tensor) -> PackedWeight:
        """Return `weight` [N, K] in the kernels' order."""
        return self.ops.pack(weight, int8=self.int8)


class Leaf(nn.Module):
    """A module filled from checkpoint tensors."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        super().__init__()
        self.shapes = shapes
        """Checkpoint names below this module, with the shapes they must have."""
        self.read_bytes = 0
        """Bytes of weights read to apply the leaf once, after packing."""
        self._arrived: dict[str, Tensor] = {}

    def fill(self, name: str, tensor: Tensor) -> None:
        """Take one tensor of `shapes`; the last one packs the leaf and frees the originals."""
        self._arrived[name] = tensor
        if len(self._arrived) == len(self.shapes):
            arrived, self._arrived = self._arrived, {}
            self.build(arrived)

    def build(self, tensors: dict[str, Tensor]) -> None:
        """Make the leaf ready from all of `shapes`."""
        raise NotImplementedError


class Linear(Leaf):
    """x W^T + b on a packed weight."""

    def __init__(self, packing: Packing, shapes: dict[str, Shape]) -> None:
        super().__init__(shapes)
        self._packing = packing
        self._linear = packing.ops.linear
        self._width = shapes["weight"][1]

    def build(self, tensors: dict[str, Tensor]) -> None:
        """Pack the weight; a bias stays as it is."""
        bias = tensors.get("bias")
        self._weight = self._packing.pack(tensors["weight"])
        self._bias = None if bias is None else bias.clone()
        self.read_bytes = self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Return [1, T, N] for x [1, T, K]."""
        return self._linear(x.view(-1, self._width), self._weight, self._bias).unsqueeze(0)


class GatedMLP(Leaf):
    """down(silu(gate(x)) * up(x)) in one kernel call."""

    def __init__(self, packing: Packing, hidden: int, inner: int) -> None:
        super().__init__(
            {
                "gate_proj.weight": (inner, hidden),
                "up_proj.weight": (inner, hidden),
                "down_proj.weight": (hidden, inner),
            }
        )
        self._packing = packing
        self._gated_mlp = packing.ops.gated_mlp
        self._width = hidden

    def build(self, tensors: dict[str, Tensor]) -> None:
        """Pack gate and up as one weight, gate rows first."""
        gate_up = torch.cat([tensors["gate_proj.weight"], tensors["up_proj.weight"]])
        self._gate_up = self._packing.pack(gate_up)
        self._down = self._packing.pack(tensors["down_proj.weight"])
        self.read_bytes = self._gate_up.nbytes + self._down.nbytes

    def rows(self, x: Tensor) -> Tensor:
        """Return [T, K] for x [T, K]."""
        return self._gated_mlp(x, self._gate_up, self._down)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [1, T, K] for x [1, T, K]."""
        return self._gated_mlp(x.view(-1, self._width), self._gate_up, self._down).unsqueeze(0)


class RMSNorm(Leaf):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, packing: Packing, width: int, eps: float) -> None:
        super().__init__({"weight": (width,)})
        self._rms_norm = packing.ops.rms_norm
        self._eps = eps

    def build(self, tensors: dict[str, Tensor]) -> None:
        """Keep the weight."""
        self._weight = tensors["weight"].clone()
        self.read_bytes = self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Return [1, T, K] for x [1, T, K]."""
        return self._rms_norm(x, self._weight, self._eps)


class Embedding(Leaf):
    """Rows of a table, kept plain."""

    def __init__(self, shape: Shape) -> None:
        super().__init__({"weight": shape})

    def build(self, tensors: dict[str, Tensor]) -> None:
        """Keep the table."""
        self._rows = tensors["weight"].clone()

    def __call__(self, ids: Tensor) -> Tensor:
        """Return [1, T, K] for ids [1, T]."""
        return nn.functional.embedding(ids, self._rows)


class RotaryEmbedding(Leaf):
    """cos and sin of every position, gathered from a table computed once.

    Angles are the float32 products transformers computes; their cos and sin are taken in float64
    and rounded, so that no entry depends on vector width, threads or the step it is used in.
    """

    def __init__(
        self,
        inv_freq: Tensor,
        scaling: float,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device = HOST,
    ) -> None:
        super().__init__({})
        angles = torch.arange(max_positions).float()[:, None] * inv_freq.float()
        wide = angles.double()
        self._cos = self._table(wide.cos(), scaling, dtype).to(device)
        self._sin = self._table(wide.sin(), scaling, dtype).to(device)

    @staticmethod
    def _table(half: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        table = (half.float() * scaling).to(dtype)
        return torch.cat((table, table), dim=-1)

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [1, T, D] for positions [1, T]."""
        embedding = nn.functional.embedding
        return embedding(position_ids, self._cos), embedding(position_ids, self._sin)
