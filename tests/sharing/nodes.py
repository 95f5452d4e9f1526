"""One node's chain and the tenants that send it, without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvkeep.sharing.members import Member
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.promotion import Promotion
from kvkeep.types import Chain, EpochDelta, Int32Array
from tests.sharing.worlds import TAINT, Finds, Setting

SIX = ("a", "b", "c", "d", "e", "f")


class Blocks(Chain):
    """A chain of pages, each 64 times one number; a page's hash is the path to it."""

    def __init__(self, *blocks: int) -> None:
        self.blocks = blocks
        self.hashes = [repr(blocks[: i + 1]).encode() for i in range(len(blocks))]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, key: int | slice) -> bytes | Sequence[bytes]:  # type: ignore[override]
        return self.hashes[key]

    def token_ids(self) -> Int32Array:
        return np.repeat(np.array(self.blocks, np.int32), 64)


def sharing(
    names: Sequence[str] = SIX, *, k: int = 4, life: int = 10, token: int = TAINT, **limits: int
) -> tuple[Setting, Promotion]:
    setting = Setting(inspector=Finds(token))
    setting.directory.set({name: Member(name, "all") for name in names})
    return setting, setting.promotion(AtLeast(k, life_epochs=life), **limits)


def end_epochs(policy: Promotion, count: int = 1) -> EpochDelta:
    delta = EpochDelta(0)
    for _ in range(count):
        delta = policy.end_epoch(0.0)
    return delta


def readers(policy: Promotion, chain: Chain, names: Sequence[str] = SIX) -> dict[str, int]:
    return {name: policy.public_len(chain, name) for name in names}
