"""The device's attention benchmark on a tiny tree; its figures from planted gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import attention_gpu as bench
from bench.attention_grids import Tree
from bench.harness import Estimate, Options
from kvkeep.attention.planner import FlatPlanner
from kvkeep.errors import ConfigError
from kvkeep.ops.triton_attention import TritonAttention
from tests.forests import eager
from tests.ops.devices import DEVICE
from tests.oracles import Heads

TINY = Heads(2, 1, 16)


def tiny_cell() -> bench.DeviceCell:
    tree = Tree("tiny", (1, 3), (256, 40))
    cell = bench.cell_of(tree, TINY, torch.float32, torch.device(DEVICE), 1 << 20)
    assert cell is not None
    return cell


def test_flat_and_tree_attend_the_same() -> None:
    cell = tiny_cell()
    plans = [FlatPlanner().plan(cell.step), eager(2).plan(cell.step)]
    assert plans[1].parents is not None
    attention = TritonAttention(cell.q.device)
    flat, tree = (attention.attend(cell.q, cell.layers[0], plan).out for plan in plans)
    torch.testing.assert_close(flat, tree, atol=1e-5, rtol=1e-5)


def test_a_cell_is_measured_and_its_row_says_how() -> None:
    cell = tiny_cell()
    assert len({int(kv.tile_table[0, 0, 0]) for kv in cell.layers}) > 1
    one = bench.DeviceCell(**{**vars(cell), "layers": cell.layers[:1]})
    found = bench.measure_cell(one, bench.costs_of(one), 2)
    assert found.row["requests"] == 3
    ours = ("flat", "two_level", "fasttree_rule", "pat_rule", "torch_sdpa")
    assert all(found.row[f"over_{name}"] is not None for name in ours)
    assert found.gain.samples == 2
    assert float(np.float64(found.row["tree_gb_s"])) > 0


def test_a_tree_larger_than_the_pool_is_no_cell() -> None:
    tree = Tree("wide", (1, 64), (256, 640))
    assert bench.cell_of(tree, TINY, torch.float32, torch.device(DEVICE), 1 << 20) is None


def test_the_figures_are_over_flashinfer_where_it_ran() -> None:
    def found(gain: float, decode: float | None, cascade: float | None) -> bench.Found:
        made = [None if x is None else Estimate(x, x, x, 10) for x in (gain, decode, cascade)]
        assert made[0] is not None
        return bench.Found({}, made[0], made[1], made[2])

    alone = bench.figures_of([found(2.0, None, None), found(4.0, None, None)])
    assert [(f.name, f.estimate.median) for f in alone] == [
        ("gpu_gain_over_flat_mean", 3.0),
        ("gpu_gain_over_flat_max", 4.0),
    ]
    beside = bench.figures_of([found(9.0, 1.5, 0.8), found(9.0, 2.5, None)])
    assert [(f.name, f.estimate.median) for f in beside] == [
        ("gpu_gain_over_flashinfer_mean", 2.0),
        ("gpu_gain_over_flashinfer_max", 2.5),
        ("gpu_over_cascade_min", 0.8),
    ]


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a CUDA device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(ConfigError, match="attention_gpu needs a CUDA device"):
        bench.measure(Options(quick=True))
