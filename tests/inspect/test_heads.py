from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.engine.build import build_core
from kvkeep.errors import ConfigError
from kvkeep.eviction.calibration import Calibration
from kvkeep.eviction.corm import CormOptions
from kvkeep.inspect import heads
from kvkeep.inspect.heads import RULES, Found, Whole, calibrate
from tests.inspect.test_watch import IDS, options

PRESET = CormOptions(recent=16, spread=2)


def found(model: Path, most_lost: float) -> Found:
    told: list[tuple[int, int]] = []
    one = calibrate(
        options(model), [IDS, IDS[::-1]], most_lost, PRESET, lambda *at: told.append(at)
    )
    assert told == [(1, 2), (2, 2)]
    return one


def test_a_head_loses_no_more_than_it_may_and_keeps_less_where_it_may_lose_more(
    tiny: dict[str, Path],
) -> None:
    tight, loose = found(tiny["llama"], 0.02), found(tiny["llama"], 0.4)
    assert tight.kept.shape == tight.lost.shape == (3, 2)
    assert loose.lost.max() <= 0.4
    assert loose.kept.mean() < tight.kept.mean()
    assert all(rule in RULES for layer in loose.layers for rule in layer)


def test_weights_are_those_of_attention() -> None:
    torch.manual_seed(0)
    kv, (q, k, v) = Whole(), (torch.randn(20, h, 8) for h in (4, 2, 2))
    outs = []
    for rows in (slice(0, 12), slice(12, 20)):
        kv.append(0, k[rows], v[rows])
        outs.append(kv.attend(0, q[rows]))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
    )
    assert torch.allclose(torch.cat(outs), expected[0].transpose(0, 1), atol=1e-5)
    scores = (q[15].view(2, 2, 8) @ k[:16].permute(1, 2, 0)) / 8**0.5
    assert torch.allclose(kv.weights[0][3, :, :16], scores.softmax(-1).amax(1), atol=1e-5)
    assert not kv.weights[0][3, :, 16:].any()


def test_a_share_out_of_range_and_a_short_text_are_refused(tiny: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="most_lost: 1 must lie between 0 and 1"):
        calibrate(options(tiny["llama"]), [IDS], 1.0, PRESET, lambda *_: None)
    with pytest.raises(ConfigError, match=r"1\. file has 9 tokens"):
        calibrate(options(tiny["llama"]), [IDS[:9]], 0.1, PRESET, lambda *_: None)


def test_rows_are_cut_at_the_decision() -> None:
    steps = heads.row_steps(600, 800)
    assert steps == [(0, 256), (256, 512), (512, 600), (600, 800)]
    assert np.sum([end - begin for begin, end in steps]) == 800


def test_an_engine_takes_what_lies_beside_its_model(tiny: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(tiny["llama"], own)
    one = found(own, 0.4)
    Calibration(model=one.digest, layers=one.layers).write(own)
    core = build_core(options(own, evict="corm"))
    core.close()
    Calibration(model="00", layers=one.layers).write(own)
    with pytest.raises(ConfigError, match="measured on other weights"):
        build_core(options(own, evict="corm"))
    build_core(options(own, evict="corm", evict_window=64)).close()
