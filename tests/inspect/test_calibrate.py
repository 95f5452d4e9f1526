from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvkeep.errors import ConfigError
from kvkeep.inspect.calibrate import (
    FEW,
    MANY,
    Found,
    Goal,
    Trial,
    calibrate,
    check_budget,
    cut,
    divergence,
    kept_by_budget,
    layouts,
    with_few,
)
from kvkeep.quant.codec import Float
from kvkeep.quant.hack import Hack
from kvkeep.types import Layout
from tests.inspect.test_watch import IDS, options


def found(model: Path, goal: Goal) -> Found:
    told: list[tuple[int, int]] = []
    texts = [IDS * 2, IDS[::-1] * 2]
    one = calibrate(options(model), texts, goal, lambda *at: told.append(at))
    assert told == [(i + 1, 6) for i in range(6)]
    return one


def test_a_budget_goes_to_the_heads_that_two_bits_cost_most(tiny: dict[str, Path]) -> None:
    one = found(tiny["llama"], Goal(3.0))
    assert one.cost.shape == one.chosen.shape == (3, 2)
    assert one.chosen.sum() == 3
    assert one.cost[one.chosen].min() >= one.cost[~one.chosen].max()
    assert 0 < one.many < one.divergence < one.few
    half = found(tiny["llama"], Goal(3.0, one.divergence))
    assert half.divergence <= one.divergence
    assert half.chosen.sum() >= 1
    loose = found(tiny["llama"], Goal(3.0, 10 * one.few))
    assert not loose.chosen.any(), "two bits everywhere are good enough"
    assert loose.divergence == loose.few == one.few, "the same figures every time"
    with pytest.raises(ConfigError, match="quality: four bits everywhere diverge by"):
        calibrate(options(tiny["llama"]), [IDS * 2], Goal(3.0, one.many / 100), lambda *_: None)


def test_a_trial_is_the_codec_that_is_named_and_finds_nothing_cached(
    tiny: dict[str, Path],
) -> None:
    trial = Trial(options(tiny["llama"], guard_share=1.0))
    plain, again = (trial.logprobs(Float(), [IDS]) for _ in range(2))
    coded = trial.logprobs(Hack(Layout.K2V2), [IDS])
    after = trial.logprobs(Float(), [IDS])
    assert len(plain) == len(IDS) - 128
    assert np.array_equal(plain, again)
    assert np.array_equal(plain, after)
    assert divergence(coded, plain) > 0
    texts = trial.own_texts()
    assert [len(text) for text in texts] == [896] * 4
    assert all(text[:448] == text[448:] for text in texts)
    assert len(set(texts)) == 4
    trial.close()


def test_texts_are_cut_and_short_ones_refused() -> None:
    pieces = cut([list(range(700)), list(range(300))], 256)
    assert [len(piece) for piece in pieces] == [256, 256, 256]
    assert cut([], 256) == []
    with pytest.raises(ConfigError, match=r"the 2\. file has 255 tokens"):
        cut([range(256), range(255)], 256)


def test_a_divergence_is_half_the_mean_square_change() -> None:
    assert divergence(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 1.0


@pytest.mark.parametrize(("bits", "kept"), [(2.0, 0), (2.5, 2), (3.0, 4), (3.9, 7), (4.0, 8)])
def test_a_budget_is_never_exceeded(bits: float, kept: int) -> None:
    assert kept_by_budget(8, bits) == kept


@pytest.mark.parametrize("bits", [1.9, 4.1, float("nan")])
def test_a_budget_out_of_range_is_refused(bits: float) -> None:
    with pytest.raises(ConfigError, match="budget_bits"):
        check_budget(bits)


def test_a_choice_is_layouts() -> None:
    chosen = with_few((2, 2), np.array([1, 2]))
    assert layouts(chosen) == [[MANY, FEW], [FEW, MANY]]
