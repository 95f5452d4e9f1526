"""What observing kernels find, task by task, and how the host joins it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.types import PAGE_TOKENS, Int32Array, UInt64Array


class Looked:
    """Where kernels write hits and stamps of their visits."""

    def __init__(
        self, visits: NDArray[np.int32], heads: int, device: torch.device, *, stamps: bool
    ) -> None:
        self._entries = visits[:, 0]
        self._asked = stamps
        shape = (len(visits), heads)
        self.words = torch.zeros(shape, dtype=torch.int64, device=device)
        kept = (*shape, PAGE_TOKENS) if stamps else (1,)
        self.stamps = torch.full(kept, -1, dtype=torch.int32, device=device)

    def joined(self, entries: int) -> tuple[UInt64Array, Int32Array | None]:
        """Return hits [E, Hkv] and, if asked, stamps [E, Hkv, S] of all visits."""
        shape = (entries, self.words.shape[1])
        hits = np.zeros(shape, np.uint64)
        np.bitwise_or.at(hits, self._entries, self.words.cpu().numpy().view(np.uint64))
        if not self._asked:
            return hits, None
        stamps = np.full((*shape, PAGE_TOKENS), -1, np.int32)
        np.maximum.at(stamps, self._entries, self.stamps.cpu().numpy())
        return hits, stamps
