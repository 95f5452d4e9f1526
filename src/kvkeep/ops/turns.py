"""Turning heads: every KV head's rows times a matrix of its own, query heads with their KV head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kvkeep.errors import KernelInputError


@dataclass(frozen=True, slots=True)
class Orders:
    """x -> x[order], a permutation for each KV head."""

    order: torch.Tensor
    """[Hkv, D] int32."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (Hkv, D)."""
        heads, dim = self.order.shape
        return heads, dim

    def matrices(self) -> torch.Tensor:
        """Return [Hkv, D, D] float64, applied from the right."""
        eye = torch.eye(self.order.shape[1], dtype=torch.float64)
        return eye[self.order.long()].transpose(1, 2)

    def inverse(self) -> Orders:
        """Return what undoes these."""
        return Orders(_inverse(self.order))


@dataclass(frozen=True, slots=True)
class Butterflies:
    """Thrice a permutation and factors, x -> x[order] * factor, and a Hadamard sum in between.

    D is a power of two; the sums' scale is in the factors.
    """

    order: torch.Tensor
    """[Hkv, 3, D] int32."""
    factor: torch.Tensor
    """[Hkv, 3, D] float32."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (Hkv, D)."""
        heads, _, dim = self.order.shape
        return heads, dim

    def matrices(self) -> torch.Tensor:
        """Return [Hkv, D, D] float64, applied from the right."""
        heads, dim = self.shape
        sums = hadamard_sums(dim)
        found = torch.eye(dim, dtype=torch.float64).expand(heads, dim, dim)
        for turn in range(3):
            summed = found @ sums if turn else found
            place = self.order[:, turn, None].long().expand(heads, dim, dim)
            found = summed.gather(2, place) * self.factor[:, turn, None].double()
        return found

    def inverse(self) -> Butterflies:
        """Return what undoes these: the same steps backwards, since H H is D times the identity."""
        order = _inverse(self.order.flip(1))
        factor = (1.0 / self.factor.flip(1)).gather(2, order.long())
        factor[:, 1:] /= self.shape[1]
        return Butterflies(order, factor)


@dataclass(frozen=True, slots=True)
class Matrices:
    """x -> x M, a matrix for each KV head."""

    values: torch.Tensor
    """[Hkv, D, D] float32."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (Hkv, D)."""
        heads, dim, _ = self.values.shape
        return heads, dim

    def matrices(self) -> torch.Tensor:
        """Return [Hkv, D, D] float64, applied from the right."""
        return self.values.double()

    def inverse(self) -> Matrices:
        """Return what undoes these, which must be orthogonal."""
        return Matrices(self.values.transpose(1, 2))


HeadTurns = Orders | Butterflies | Matrices


class PreparedTurns(Protocol):
    """Turns in a backend's own order; opaque to callers."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (Hkv, D)."""


class TurnOps(Protocol):
    """The turning kernels of one backend; a row's bits depend on it alone on a CPU."""

    def prepare(self, turns: HeadTurns) -> PreparedTurns:
        """Return turns as `turn_heads` takes them."""

    def turn_heads(self, x: torch.Tensor, turns: PreparedTurns) -> torch.Tensor:
        """Return x [T, H, D] turned, H a multiple of Hkv: heads h, h + 1 ... of one group."""


@dataclass(frozen=True, slots=True)
class TorchTurns:
    """Turns where they are applied: matrices, or orders that need none."""

    shape: tuple[int, int]
    values: torch.Tensor
    """[Hkv, D, D] in float32 or float64, or [Hkv, D] int64."""


class TorchTurn:
    """`TurnOps` in plain torch: products in float64 for the reference, in float32 on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._device = device
        self._dtype = dtype

    def prepare(self, turns: HeadTurns) -> TorchTurns:
        """Return turns as matrices or orders."""
        values = turns.order.long() if isinstance(turns, Orders) else turns.matrices()
        kept = values.to(self._device, None if isinstance(turns, Orders) else self._dtype)
        return TorchTurns(turns.shape, kept)

    def turn_heads(self, x: torch.Tensor, turns: PreparedTurns) -> torch.Tensor:
        """Return x [T, H, D] turned, rounded once."""
        if not isinstance(turns, TorchTurns):
            raise KernelInputError(f"{type(turns).__name__} was prepared by another backend")
        check_turned(x, turns)
        heads, dim = turns.shape
        grouped = x.reshape(len(x), heads, x.shape[1] // heads, dim)
        if turns.values.dim() == 2:
            own = [grouped[:, head, :, order] for head, order in enumerate(turns.values)]
            return torch.stack(own, 1).view(x.shape)
        turned = torch.einsum("thgd,hde->thge", grouped.to(self._dtype), turns.values)
        return turned.reshape(x.shape).to(x.dtype).contiguous()


def _inverse(order: torch.Tensor) -> torch.Tensor:
    return order.argsort(-1).to(torch.int32)


def check_turned(x: torch.Tensor, turns: PreparedTurns) -> None:
    """Raise where x is not [T, H, D] of groups of the turned heads."""
    heads, dim = turns.shape
    if x.dim() != 3 or x.shape[2] != dim or x.shape[1] % heads:
        raise KernelInputError(f"x {tuple(x.shape)} must be [T, n * {heads}, {dim}]")


def hadamard_sums(dim: int) -> torch.Tensor:
    """Return the Hadamard matrix [D, D] of ones and minus ones, float64, in its natural order."""
    found = torch.ones((1, 1), dtype=torch.float64)
    while len(found) < dim:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    if len(found) != dim:
        raise KernelInputError(f"a Hadamard sum needs a power of two, not {dim}")
    return found
