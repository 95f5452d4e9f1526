"""The device's benchmark of codes on a tiny cell; its figures from planted gains."""

from __future__ import annotations

import pytest
import torch

from bench import codes_gpu as bench
from bench.attention_gpu import DeviceCell, cell_of, ours
from bench.attention_grids import Tree
from bench.harness import Estimate, Options
from kvkeep.attention.planner import FlatPlanner
from kvkeep.errors import ConfigError
from kvkeep.ops.triton_attention import TritonAttention
from kvkeep.types import Layout
from tests.ops.devices import DEVICE
from tests.oracles import Heads


def tiny_cell() -> DeviceCell:
    tree = Tree("tiny", (2,), (128,))
    cell = cell_of(tree, Heads(2, 1, 16), torch.float32, torch.device(DEVICE), 1 << 15)
    assert cell is not None
    return cell


def test_codes_and_widened_codes_attend_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COLD_BYTES", 1)
    cell = tiny_cell()
    (kv,) = bench.coded_layers(cell, Layout.K8V8)
    plan = bench.coded_plan(FlatPlanner().plan(cell.step), Layout.K8V8)
    codes, widened = (
        TritonAttention(cell.q.device, decode=decode).attend(cell.q, kv, plan)
        for decode in (False, True)
    )
    assert codes.out.isfinite().all()
    assert (codes.out - widened.out).abs().max() <= 0.1 * widened.out.abs().max()


def test_a_cell_is_measured_and_its_row_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COLD_BYTES", 1)
    cell = tiny_cell()
    assert callable(ours(cell, FlatPlanner().plan(cell.step)))
    found = bench.measure_cell(cell, Layout.K2V2, 1)
    assert (found.row["requests"], found.context) == (2, 128)
    assert found.row["over_widened"] == found.over_widened.median > 0
    assert found.row["graphs"] == (DEVICE == "cuda")


def test_the_lowest_gains_are_the_figures() -> None:
    def found(context: int, gain: float, layout: str = "K2V2") -> bench.Found:
        one, two = (Estimate(x, x, x, 10) for x in (gain, gain + 1))
        return bench.Found({"layout": layout}, context, one, two)

    cells = [found(32_768, 2.5), found(32_768, 2.2), found(1024, 0.5), found(32_768, 1.0, "K8V8")]
    figures = bench.figures_of(cells)
    assert [(f.name, f.estimate.median) for f in figures] == [
        ("gpu_codes_over_bf16_32k", 2.2),
        ("gpu_codes_over_widened_32k", 3.2),
    ]
    assert {cell[2] for cell in bench.grid(quick=True)} == set(bench.GOALS)


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a CUDA device")
def test_no_device_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="codes_gpu needs a CUDA device"):
        bench.measure(Options(quick=True))
