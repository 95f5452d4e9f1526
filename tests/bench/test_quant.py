"""The benchmark of attention on codes, on tiny contexts; its figures from planted ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import quant as bench
from bench.harness import Estimate, Options
from bench.quant_pages import KV_HEADS, pages_of
from kvkeep.engine.sizing import held_bytes
from kvkeep.errors import ConfigError
from kvkeep.ops.codes import tile_bytes
from kvkeep.ops.cpu import available, cpu_ops, decoding_attention
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.quant.codec import Float, KVShape
from kvkeep.quant.hack import Hack
from kvkeep.types import Layout

LENGTHS = range(769, 1281)
"""Tokens of requests whose bytes the docs tell."""


def tiny(dim: int = 64, context: int = 256) -> bench.Sides:
    ops = cpu_ops(available()[0], 1).attention
    assert isinstance(ops, CpuAttention)
    plain, coded = (
        pages_of(layout, dim, context, cold_bytes=1 << 20) for layout in (Layout.BF16, Layout.K2V2)
    )
    floats, halves = (decoding_attention(available()[0], 1, halves=to) for to in (False, True))
    return bench.Sides((ops, plain), (ops, coded), (floats, coded), (halves, coded))


def test_sides_read_what_they_say() -> None:
    sides = tiny()
    assert len(sides.coded[1].layers) > 1
    q = torch.randn(1, 2 * KV_HEADS, 64).to(torch.bfloat16)
    for ops, pages in sides:
        found = ops.attend(q, pages.layers[-1], pages.plan)
        assert found.out.isfinite().all()
    coded = tile_bytes(Layout.K2V2, 64, first=True) + 3 * tile_bytes(Layout.K2V2, 64)
    assert bench.bytes_ratio(sides, q) == coded / (4 * tile_bytes(Layout.BF16, 64))
    assert sides.coded[0].decode_calls == 0
    assert sides.floats[0].decode_calls > 0
    assert sides.halves[0].decode_calls > 0


def test_a_cell_is_measured_and_its_row_says_how() -> None:
    found = bench.measure_cell(tiny(), bench.Shape(2, 64, 256), Layout.K2V2, 2, 0.0)
    assert found.over_plain.samples == found.over_widened.samples == 2
    assert found.row["codes"] == "K2V2"
    assert found.row["heads per group"] == 2


def test_codes_are_held_against_the_faster_way_of_widening() -> None:
    coded, slow, fast = np.full(10, 2.0), np.full(10, 9.0), np.full(10, 5.0)
    assert bench.over_faster(coded, (slow, fast)).median == 2.5
    assert bench.over_faster(coded, (fast, slow)).median == 2.5


def test_figures_take_the_worst_group_over_widening() -> None:
    found = {
        bench.Shape(g, bench.FIGURE_DIM, bench.FIGURE_CONTEXT): bench.Found(
            Estimate(5.0 / g, 5.0 / g, 5.0 / g, 10), Estimate(9.0 - g, 9.0 - g, 9.0 - g, 10), {}
        )
        for g in bench.GROUPS
    }
    figures = {figure.name: figure.row() for figure in bench.summary(found, 3)}
    assert figures["attend_2bit_vs_bf16_g1"]["status"] == "shown"
    assert figures["attend_2bit_vs_bf16_g7"]["status"] == "missed"
    assert figures["attend_2bit_vs_dequant"]["median"] == pytest.approx(2.0)
    assert figures["bytes_ratio_k2v2_d128"]["status"] == "shown"
    assert figures["decode_calls_hot_path"]["status"] == "missed"


def test_whole_requests_hold_more_than_their_codes() -> None:
    rows = bench.request_rows()
    assert len(rows) == 4 * len(bench.CONTEXTS)
    found = {(row["codes"], row["tokens of a request"]): row for row in rows}
    at_4096 = found["K2V2", 4096]
    assert at_4096["bytes of a layer"] == KV_HEADS * (64 * 5120 + 2048)
    assert at_4096["bytes over bf16"] == (64 * 5120 + 2048) / (64 * 32768)
    assert at_4096["most"] == (64 * 5120 + 2048 + 2 * 32768) / (64 * 32768)
    for row in rows:
        least, mean, most = (row[k] for k in ("bytes over bf16", "mean of its last block", "most"))
        assert least < mean < most  # type: ignore[operator]


@pytest.mark.parametrize("window", [128, 256, 512])
def test_bytes_of_windows_are_those_in_the_docs(window: int) -> None:
    shape = KVShape(1, 1, 128, Layout.BF16)
    plain = Float().page_spec(shape)
    spec = Hack(Layout.K2V2, window).page_spec(shape)
    over = [held_bytes(spec, plain.tile_bytes, n) / held_bytes(plain, 0, n) for n in LENGTHS]
    page = (Path(__file__).resolve().parents[2] / "docs/design/quant.md").read_text("utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {window} |"))
    assert row.endswith(f"| {sum(over) / len(over):.3f} |")


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="grid, ablations"):
        bench.measure(Options(only=("speed",)))
