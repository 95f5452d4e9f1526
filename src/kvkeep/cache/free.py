"""Which ids of a pool are free."""

from __future__ import annotations

import numpy as np

from kvkeep.errors import EngineError, PoolExhausted
from kvkeep.types import Int32Array


class FreeList:
    """A stack of free ids 0..count-1 with vectorised take and give back."""

    def __init__(self, count: int, what: str) -> None:
        self._what = what
        self._stack = np.arange(count, dtype=np.int32)
        self._used = np.zeros(count, np.bool_)
        self._free = count

    def __len__(self) -> int:
        return self._free

    def take(self, count: int) -> Int32Array:
        """Return `count` ids; raises `PoolExhausted` and takes none where fewer are free."""
        if count > self._free:
            raise PoolExhausted(f"no free {self._what}: {count} asked for, {self._free} left")
        self._free -= count
        ids = self._stack[self._free : self._free + count].copy()
        self._used[ids] = True
        return ids

    def give_back(self, ids: Int32Array) -> None:
        """Free ids; an id that is not in use, or named twice, is an `EngineError`."""
        if len(ids) == 0:
            return
        inside = int(ids.min()) >= 0 and int(ids.max()) < len(self._used)
        if not inside or not self._used[ids].all() or len(np.unique(ids)) != len(ids):
            raise EngineError(f"a {self._what} was freed that is not in use")
        self._used[ids] = False
        self._stack[self._free : self._free + len(ids)] = ids
        self._free += len(ids)

    def is_used(self, one: int) -> bool:
        """Tell whether an id is taken."""
        return 0 <= one < len(self._used) and bool(self._used[one])
