from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvkeep.errors import ConfigError
from kvkeep.sim.load import BURST_S, GRID, PAUSE_S, TRACES, Arrivals, Load, draw

MANY = Load("azure_conv", 20_000, 5.0)


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_has_a_length_for_each_percentile_and_they_grow(name: str) -> None:
    trace = TRACES[name]
    for row in (trace.prompt, trace.answer):
        assert len(row) == len(GRID)
        assert list(row) == sorted(row)
        assert row[0] >= 1


@pytest.mark.parametrize("name", TRACES)
def test_drawn_lengths_have_the_traces_percentiles(name: str) -> None:
    drawn = draw(replace(MANY, trace=name))
    for told, found in zip(TRACES[name][:2], drawn[1:], strict=True):
        for percent in (10, 50, 90, 95):
            expected = told[GRID.index(percent)]
            assert np.percentile(found, percent) == pytest.approx(expected, rel=0.15, abs=1)


def test_lengths_are_scaled_then_cut_the_prompt_first() -> None:
    whole = draw(MANY)
    less = draw(replace(MANY, scale=1 / 8))
    assert np.array_equal(less.at_s, whole.at_s)
    assert less.prompt_tokens.mean() == pytest.approx(whole.prompt_tokens.mean() / 8, rel=0.01)
    cut = draw(replace(MANY, most_tokens=512))
    assert (cut.prompt_tokens + cut.answer_tokens).max() == 512
    assert np.array_equal(cut.answer_tokens, np.minimum(whole.answer_tokens, 511))


@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "bursts"])
def test_arrivals_come_in_order_at_the_mean_rate(arrivals: Arrivals) -> None:
    at = draw(replace(MANY, arrivals=arrivals, requests=400_000)).at_s
    assert (np.diff(at) >= 0).all()
    assert len(at) / at[-1] == pytest.approx(5.0, rel=0.1)


def test_bursts_stand_still_for_most_of_the_time() -> None:
    def idle_share(arrivals: Arrivals) -> float:
        at = draw(replace(MANY, arrivals=arrivals)).at_s
        gaps = np.diff(at)
        return float(gaps[gaps > 2.0].sum() / at[-1])

    assert idle_share("bursts") == pytest.approx(PAUSE_S / (PAUSE_S + BURST_S), abs=0.12)
    assert idle_share("poisson") < 0.01


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    one, again, other = draw(MANY), draw(MANY), draw(replace(MANY, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one.at_s, other.at_s)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trace": "none"}, "trace: no 'none'; there are azure_code"),
        ({"requests": 0}, "requests: 0"),
        ({"per_second": 0.0}, "above 0"),
        ({"scale": -1.0}, "above 0"),
        ({"most_tokens": 1}, "most_tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(MANY, **change)  # type: ignore[arg-type]
