"""Choose the native path: which instruction sets this CPU has, and the backend built on one."""

from __future__ import annotations

import time
from typing import Final, Literal

import torch

from kvkeep.errors import ConfigError
from kvkeep.ops import _native
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.cpu_encode import CpuEncoder
from kvkeep.ops.cpu_leaf import CpuLeaf
from kvkeep.ops.cpu_sample import CpuSample
from kvkeep.ops.cpu_turn import CpuTurn
from kvkeep.ops.layout import Ops

CpuKernel = Literal["avx512", "avx2", "portable"]

_ISAS: Final[dict[CpuKernel, _native.Isa]] = {
    "avx512": _native.Isa.AVX512,
    "avx2": _native.Isa.AVX2,
    "portable": _native.Isa.PORTABLE,
}

_PIECE_BYTES: Final = 16 << 20
_SPIN_ROUNDS: Final = 100_000


def available() -> tuple[CpuKernel, ...]:
    """Return the paths this CPU runs, fastest first."""
    return tuple(name for name, isa in _ISAS.items() if _native.missing_feature(isa) is None)


class ReadBandwidth:
    """Measures how fast this machine reads memory, the ceiling of kernels that stream weights."""

    def __init__(self, threads: int, size_bytes: int = 192 << 20) -> None:
        self._backend = _native.Backend(_native.Isa.PORTABLE, threads)
        self._buffer = torch.zeros(size_bytes, dtype=torch.uint8)

    def measure_gb_s(self) -> float:
        """Return GB/s over one read of the whole buffer."""
        return self._read_gb_s(0, self._buffer.nbytes)

    def best_gb_s(self) -> float:
        """Return GB/s of the fastest 16 MiB of one read, for a machine shared with others."""
        starts = range(0, self._buffer.nbytes, _PIECE_BYTES)
        return max(self._read_gb_s(i, min(_PIECE_BYTES, self._buffer.nbytes - i)) for i in starts)

    def _read_gb_s(self, first: int, size: int) -> float:
        begin = time.perf_counter()
        _native.read_all(self._backend, self._buffer.data_ptr() + first, size)
        return size / (time.perf_counter() - begin) / 1e9


class DotPeak:
    """Measures what the cores can multiply and add, the ceiling of kernels that compute."""

    def __init__(self, kernel: CpuKernel, threads: int) -> None:
        self._backend = _native.Backend(_ISAS[kernel], threads)
        self._attention = _native.Attention(self._backend, _native.Widen.NO)

    def measure_gflop_s(self, layout: _native.Layout = _native.Layout.BF16) -> float:
        """Return GFLOP/s of a layout's products, from registers alone, on every thread."""
        begin = time.perf_counter()
        flops = self._attention.spin(layout, _SPIN_ROUNDS)
        return flops / (time.perf_counter() - begin) / 1e9


def cpu_ops(kernel: CpuKernel, threads: int) -> Ops:
    """Return the kernels of one path, run by `threads` threads."""
    backend = _backend(kernel, threads)
    attention = CpuAttention(backend)
    leaf, sample, turn = CpuLeaf(backend), CpuSample(backend), CpuTurn(backend)
    return Ops(kernel, attention, leaf, sample, turn, parts=attention)


def decoding_attention(kernel: CpuKernel, threads: int, *, halves: bool = False) -> CpuAttention:
    """Return attention that widens codes: what benchmarks compare with.

    In registers to floats, or with `halves` and bfloat16 queries a tile at a time to bfloat16: so
    far on AVX-512 and of two and four bits, elsewhere to floats.
    """
    widen = _native.Widen.HALVES if halves else _native.Widen.FLOATS
    return CpuAttention(_backend(kernel, threads), widen=widen)


def cpu_encoder(kernel: CpuKernel | None = None) -> CpuEncoder:
    """Return what codes pages; None: the fastest path, since all have the same bits."""
    return CpuEncoder(_isa(kernel or available()[0]))


def _backend(kernel: CpuKernel, threads: int) -> _native.Backend:
    return _native.Backend(_isa(kernel), threads)


def _isa(kernel: CpuKernel) -> _native.Isa:
    isa = _ISAS[kernel]
    flag = _native.missing_feature(isa)
    if flag is not None:
        raise ConfigError(
            f"kernel: '{kernel}' needs the CPU flag {flag}, which this CPU lacks; use 'auto'"
        )
    return isa
