"""Bring a step's arrays to a device in one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGN: Final = 256
_FIRST_BYTES: Final = 1 << 16
_MOST_ROOM: Final = 1 << 20
"""Bytes up to which an array's place is a power of two; a larger one's is a multiple of it."""

_DTYPES: Final = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class Uploader:
    """Packs arrays into one page-locked buffer that stays, and copies it at once.

    What a call returned is overwritten by the next one: use one uploader per kind of step data.
    An array lies where it did as long as no array has outgrown its place: kernels in a captured
    graph find the next step's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.transfers = 0
        """Copies made so far."""
        self._reserve(_FIRST_BYTES)

    def __call__(self, arrays: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
        """Return the arrays on the device, each 256-byte aligned; uint64 becomes int64."""
        dense = [_plain(array) for array in arrays]
        starts, size = [], 0
        for array in dense:
            starts.append(size)
            size += _place(array.nbytes)
        if self._copied is not None:
            self._copied.synchronize()
        if size > self._host.numel():
            self._reserve(1 << (size - 1).bit_length())
        staged = self._host.numpy()
        for start, array in zip(starts, dense, strict=True):
            staged[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._there[:size].copy_(self._host[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self.transfers += 1
        return [
            self._there[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
            for start, array in zip(starts, dense, strict=True)
        ]

    def _reserve(self, size: int) -> None:
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=self._copied is not None)
        self._there = torch.empty(size, dtype=torch.uint8, device=self._device)


def _place(size: int) -> int:
    """Return the bytes kept for an array of `size`, with room to grow."""
    if size > _MOST_ROOM:
        return -(-size // _MOST_ROOM) * _MOST_ROOM
    return max(_ALIGN, 1 << (max(size, 1) - 1).bit_length())


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    dense = np.ascontiguousarray(array)
    return dense.view(np.int64) if dense.dtype == np.uint64 else dense
