from __future__ import annotations

import pytest

from bench.storm import LONG_PROMPT, Window, fair, ratios, row, together


def window(kind: str, scale: float) -> Window:
    return Window(kind, tuple(scale * i for i in range(101)), 1000.0 * scale)


def test_a_fair_neighbour_asks_for_half_of_what_a_storm_read() -> None:
    rate = fair(window("storm", 20.0)).per_second
    assert rate is not None
    assert rate * LONG_PROMPT == 10_000


def test_percentiles_are_compared_pair_by_pair() -> None:
    pairs = [(window("fair", 1.0), window("storm", scale)) for scale in (1.0, 2.0, 6.0)]
    assert ratios(pairs, 99).median == 2.0
    assert ratios(pairs, 50).samples == 3


def test_windows_together_are_one_row() -> None:
    shown = row(together("all", [window("storm", 1.0), window("storm", 3.0)]))
    assert shown["requests"] == 202
    assert shown["read_tokens_per_s"] == 2000.0
    assert shown["p99_ms"] == pytest.approx(294e3, rel=0.01)
