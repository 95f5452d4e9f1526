"""Choose the native path: which instruction sets this CPU has, and the backend built on one."""

from __future__ import annotations

from typing import Final, Literal

from kvkeep.errors import ConfigError
from kvkeep.ops import _native
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.cpu_leaf import CpuLeaf
from kvkeep.ops.layout import Ops

CpuKernel = Literal["avx512", "avx2", "portable"]

_ISAS: Final[dict[CpuKernel, _native.Isa]] = {
    "avx512": _native.Isa.AVX512,
    "avx2": _native.Isa.AVX2,
    "portable": _native.Isa.PORTABLE,
}


def available() -> tuple[CpuKernel, ...]:
    """Return the paths this CPU runs, fastest first."""
    return tuple(name for name, isa in _ISAS.items() if _native.missing_feature(isa) is None)


def cpu_ops(kernel: CpuKernel, threads: int) -> Ops:
    """Return the kernels of one path, run by `threads` threads."""
    isa = _ISAS[kernel]
    flag = _native.missing_feature(isa)
    if flag is not None:
        raise ConfigError(
            f"kernel: '{kernel}' needs the CPU flag {flag}, which this CPU lacks; use 'auto'"
        )
    backend = _native.Backend(isa, threads)
    return Ops(name=kernel, attention=CpuAttention(backend), leaf=CpuLeaf(backend))
