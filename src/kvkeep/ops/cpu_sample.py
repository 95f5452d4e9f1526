"""Sampling on the CPU: cheap checks, then one native call over all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from kvkeep.errors import KernelInputError
from kvkeep.ops import _native
from kvkeep.ops.layout import Drawn, DrawRow, Largest

_DTYPE: Final = {
    torch.float32: _native.Dtype.F32.value,
    torch.bfloat16: _native.Dtype.BF16.value,
}

_LARGEST_ROW: Final = np.dtype(
    [("logits", np.uint64), ("dtype", np.int64), ("token", np.int64), ("value", np.float64)]
)
_DRAW_ROW: Final = np.dtype(
    [
        ("logits", np.uint64),
        ("dtype", np.int64),
        ("top", np.float32),
        ("scale", np.float32),
        ("bound", np.float32),
        ("weight", np.float32),
        ("ties", np.int64),
        ("uniform", np.float64),
        ("mass", np.float64),
        ("token", np.int64),
    ]
)


class CpuSample:
    """`SampleOps` of one native backend; calls take turns."""

    def __init__(self, backend: _native.Backend) -> None:
        self._backend = backend

    def largest(self, rows: Sequence[torch.Tensor]) -> list[Largest]:
        """Return the largest of each row of logits [V], float32 or bfloat16."""
        if not rows:
            return []
        vocab = rows[0].numel()
        jobs = np.array([(*_address(row, vocab), 0, 0.0) for row in rows], _LARGEST_ROW)
        _native.find_largest(self._backend, jobs.ctypes.data, len(jobs), vocab)
        pairs = zip(jobs["token"].tolist(), jobs["value"].tolist(), strict=True)
        return [Largest(token, value) for token, value in pairs]

    def draw(self, rows: Sequence[DrawRow]) -> list[Drawn]:
        """Draw an id per row; the same id for any number of threads."""
        if not rows:
            return []
        vocab = rows[0].logits.numel()
        jobs = np.array(
            [
                (
                    *_address(row.logits, vocab),
                    row.top,
                    row.scale,
                    row.bound,
                    0.0,
                    row.ties,
                    row.uniform,
                    0.0,
                    0,
                )
                for row in rows
            ],
            _DRAW_ROW,
        )
        _native.draw(self._backend, jobs.ctypes.data, len(jobs), vocab)
        columns = (jobs["token"].tolist(), jobs["weight"].tolist(), jobs["mass"].tolist())
        return [Drawn(*drawn) for drawn in zip(*columns, strict=True)]


def _address(row: torch.Tensor, vocab: int) -> tuple[int, int]:
    """Return where a row of logits lies, and the native number of its dtype."""
    dtype = _DTYPE.get(row.dtype)
    if dtype is None or row.shape != (vocab,) or not vocab or not row.is_contiguous():
        raise KernelInputError(
            f"logits {tuple(row.shape)} {row.dtype} must be dense [{vocab}], float32 or bfloat16"
        )
    return row.data_ptr(), dtype
