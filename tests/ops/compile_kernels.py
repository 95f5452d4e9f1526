"""Compile Triton's kernels for a Hopper device; needs no device. Run without TRITON_INTERPRET."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvkeep.ops import triton_codes as codes
from kvkeep.ops import triton_kernels as kernels
from kvkeep.types import Layout

BYTES = {"tiles": "*u8", "halves": "*i16"}
HALF = {"tiles", "q", "k", "v", "out"}
FLOATS = {"part_out", "part_lse2", "lse2", "thresholds"}
WORDS = {"masks", "words"}
INTS = {"table", "tasks", "visits", "targets", "order", "positions", "pages", "private", "slots",
        "rows", "bounds", "stamps"}  # fmt: skip
STRIDES = {"q_token", "q_head", "k_token", "k_head", "v_token", "v_head"}


def type_of(name: str, half: str) -> str:
    for names, found in ((HALF, f"*{half}"), (FLOATS, "*fp32"), (WORDS, "*i64"), (INTS, "*i32")):
        if name in names:
            return found
    return "fp32" if name == "scale" else "i32"


def ptx_of(kernel: Any, half: str, warps: int = 4, **fixed: int) -> str:
    """Return a kernel's PTX for sm_90, pointers and strides multiples of 16."""
    names = kernel.arg_names
    bytes_of = BYTES if "halves" in names else {}
    types = {
        name: "constexpr" if name in fixed else bytes_of.get(name, type_of(name, half))
        for name in names
    }
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in STRIDES]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": not bytes_of}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return str(made.asm["ptx"])


def main() -> str | None:
    tile = {"S": 64, "D": 128, "BLOCK_D": 128, "UNIT": 32}
    plain = {"G": 4, "HAS_PRIVATE": False, "HAS_MASKS": False, **tile}
    ptx_of(kernels.append_kernel, "bf16", BLOCK_T=16, **tile)
    ptx_of(kernels.merge_kernel, "bf16", D=128, BLOCK_D=128)
    odd = {"G": 7, "HAS_PRIVATE": True, "HAS_MASKS": True, "S": 64, "D": 80, "BLOCK_D": 128,
           "UNIT": 32}  # fmt: skip
    ptx_of(kernels.observe_kernel, "bf16", ROWS=16, STAMPS=True, **odd)
    ptx_of(kernels.node_kernel, "fp32", ROWS=16, **odd)
    ones = {"num_layers": 1, "num_kv_heads": 1}  # as Triton specialises them
    ptx_of(kernels.append_kernel, "bf16", BLOCK_T=16, **ones, **tile)
    ptx_of(kernels.node_kernel, "bf16", ROWS=32, **ones, **plain)
    for rows, warps, matrix in ((16, 4, "mma.sync"), (64, 4, "wgmma"), (128, 8, "wgmma")):
        ptx = ptx_of(kernels.node_kernel, "bf16", warps, ROWS=rows, **plain)
        if matrix not in ptx or "cp.async" not in ptx:
            return f"{rows} rows: no {matrix} or no asynchronous copies"
    return coded()


def coded() -> str | None:
    """Compile what reads codes; return what its products lack."""
    told = {"G": 4, "S": 64, "HAS_PRIVATE": False, "HAS_MASKS": False}
    for layout, dim, rows, matrix in (
        (Layout.K2V2, 128, 16, "m16n8k32.row.col.satfinite.s32.s8.s8"),
        (Layout.K8V8, 64, 64, "m64n64k32.s32.s8.s8"),
        (Layout.K4V2, 80, 32, "m16n8k32.row.col.satfinite.s32.s8.s8"),
    ):
        fixed = {
            **told,
            "D": dim,
            "ROWS": rows,
            **codes.coded_arguments(layout, dim, 64, decode=False),
        }
        if matrix not in ptx_of(codes.coded_node_kernel, "bf16", **fixed):
            return f"{layout.name}, {rows} rows: no products of bytes"
    fixed = {
        **told,
        "D": 128,
        "ROWS": 16,
        **codes.coded_arguments(Layout.K4V4, 128, 64, decode=True),
    }
    ptx_of(codes.coded_node_kernel, "bf16", **fixed)
    ptx_of(codes.coded_observe_kernel, "bf16", **fixed)
    return None


if __name__ == "__main__":
    sys.exit(main())
