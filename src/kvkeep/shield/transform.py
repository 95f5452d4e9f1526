"""Exact transforms of K, V and Q: what lies in a page is the model's rows times a secret matrix.

`perm` is the published method made right for RoPE and grouped heads: a permutation of channels for
each layer and KV head, shared by the head's group of queries, keys permuted after RoPE. `orth`
is a rotation, two Hadamard sums with secret signs and permutations between. `mask` is `orth` with a
secret vector added to every key and every value of a head: a softmax does not see the first, and
the weights of a row sum to one, so the second is taken off the output.

What each is worth is said in `guarantees`; none protects from somebody who has the weights.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np
import torch

from kvkeep.ops.layout import Heads, Ops, WeightFold
from kvkeep.ops.turns import Butterflies, HeadTurns, Matrices, Orders, PreparedTurns
from kvkeep.shield.drbg import Stream, derive
from kvkeep.shield.policy import Role, Transform
from kvkeep.shield.transform_folds import FoldValues, KVSizes

TransformName = Literal["perm", "orth", "mask"]
MASK_SIZE: Final = 0.5
"""Of a mask's entries, over the root mean square of what they are added to."""


class Secrets:
    """The secret maps of one mode, engine key and epoch; derived when a layer is first used."""

    def __init__(self, mode: TransformName, key: bytes, epoch: int) -> None:
        self.mode = mode
        self._key = derive(key, "transform", mode, epoch)
        self.name = f"{mode}-{epoch}-{derive(self._key, 'name')[:8].hex()}"
        """Says which key a page is under, and nothing of the key."""
        self._turns: dict[tuple[str, int], HeadTurns] = {}

    def turns(self, role: Literal["k", "v"], layer: int, heads: Heads) -> HeadTurns:
        """Return how a layer's keys (and queries) or values are turned."""
        known = self._turns.get((role, layer))
        if known is None:
            streams = [self._stream(role, layer, head) for head in range(heads.num_kv_heads)]
            known = _turns_of(self.mode, streams, heads.head_dim)
            self._turns[role, layer] = known
        return known

    def shift(self, role: Literal["k", "v"], layer: int, heads: Heads) -> torch.Tensor:
        """Return [Hkv, D] float64 of unit size."""
        streams = [self._stream(f"{role}-mask", layer, h) for h in range(heads.num_kv_heads)]
        return torch.from_numpy(np.stack([one.normals(heads.head_dim) for one in streams]))

    def _stream(self, role: str, layer: int, head: int) -> Stream:
        return Stream(derive(self._key, role, layer, head))


class LinearShield:
    """One of the exact transforms under a key of its own."""

    def __init__(
        self, mode: TransformName, key: bytes, epoch: int = 0, *, fold: bool = True
    ) -> None:
        """`fold`: values are turned by the weights that make them and undone by the output's.

        Without it both are done in every step, as published; pages are the same.
        """
        if mode not in get_args(TransformName):
            raise ValueError(f"{mode!r} is no transform")
        self._secrets = Secrets(mode, key, epoch)
        self.name = self._secrets.name
        self._fold = fold
        self._sizes = KVSizes() if mode == "mask" else None

    def folds(self, heads: Heads) -> tuple[WeightFold, ...]:
        """Return what looks at the sizes of keys and values, and what turns values by weights."""
        looks: tuple[WeightFold, ...] = () if self._sizes is None else (self._sizes,)
        return (*looks, FoldValues(heads, self._secrets.turns)) if self._fold else looks

    def on(self, heads: Heads, ops: Ops) -> Transform:
        """Return the work within a step."""
        return LinearTransform(self._secrets, heads, ops, self._sizes, folded=self._fold)


class LinearTransform:
    """Turns and shifts rows, by one backend's kernels."""

    def __init__(
        self, secrets: Secrets, heads: Heads, ops: Ops, sizes: KVSizes | None, *, folded: bool
    ) -> None:
        self._secrets = secrets
        self._heads = heads
        self._ops = ops
        self._sizes = sizes
        self._folded = folded
        self._prepared: dict[tuple[str, int], PreparedTurns] = {}
        self._shifts: dict[tuple[str, int], torch.Tensor] = {}

    def transform(self, x: torch.Tensor, role: Role, layer: int) -> torch.Tensor:
        """Return x [T, H, D] turned, and shifted where it is stored under a mask."""
        turned = x
        if role != "v":
            turned = self._ops.turn.turn_heads(x, self._turns("k", layer))
        elif not self._folded:
            turned = self._ops.turn.turn_heads(x, self._turns("v", layer))
        if self._sizes is None or role == "q":
            return turned
        return turned + self._shift(role, layer, self._sizes).to(x.dtype)

    def restore(self, out: torch.Tensor, layer: int) -> torch.Tensor:
        """Return out [T, Hq, D] without the values' shift, turned back unless weights do it."""
        if self._sizes is not None:
            shift = self._shift("v", layer, self._sizes)
            group = self._heads.num_q_heads // self._heads.num_kv_heads
            out = (out.float() - shift.repeat_interleave(group, 0)).to(out.dtype)
        if self._folded:
            return out
        return self._ops.turn.turn_heads(out, self._turns("back", layer))

    def _turns(self, what: Literal["k", "v", "back"], layer: int) -> PreparedTurns:
        known = self._prepared.get((what, layer))
        if known is None:
            turns = self._secrets.turns("k" if what == "k" else "v", layer, self._heads)
            known = self._ops.turn.prepare(turns.inverse() if what == "back" else turns)
            self._prepared[what, layer] = known
        return known

    def _shift(self, role: Literal["k", "v"], layer: int, sizes: KVSizes) -> torch.Tensor:
        """Return [Hkv, D] float32, in numbers that bfloat16 has: added and taken off alike."""
        known = self._shifts.get((role, layer))
        if known is None:
            size = MASK_SIZE * sizes.of(role, layer, self._heads)
            unit = self._secrets.shift(role, layer, self._heads)
            known = (unit * size[:, None]).to(torch.bfloat16).float().to(self._ops.device)
            self._shifts[role, layer] = known
        return known


def _turns_of(mode: TransformName, streams: list[Stream], dim: int) -> HeadTurns:
    if mode == "perm":
        return Orders(torch.from_numpy(np.stack([one.permutation(dim) for one in streams])))
    if dim & (dim - 1):
        return Matrices(torch.from_numpy(np.stack([_rotation(one, dim) for one in streams])))
    orders, factors = [], []
    for one in streams:
        straight = np.arange(dim, dtype=np.int32)
        orders.append(np.stack([straight, one.permutation(dim), one.permutation(dim)]))
        scale = np.array([1.0, dim**-0.5, dim**-0.5])
        factors.append(np.stack([one.signs(dim) for _ in range(3)]) * scale[:, None])
    return Butterflies(
        torch.from_numpy(np.stack(orders)), torch.from_numpy(np.stack(factors)).float()
    )


def _rotation(stream: Stream, dim: int) -> np.ndarray:
    """Return an orthogonal matrix [D, D] float32, each as likely."""
    q, r = np.linalg.qr(stream.normals(dim * dim).reshape(dim, dim))
    found: np.ndarray = (q * np.sign(np.diag(r))).astype(np.float32)
    return found
