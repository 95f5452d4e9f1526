from __future__ import annotations

import pytest

from bench import shield
from bench.harness import Options
from bench.shield_attacks import share_of
from bench.shield_transforms import PUBLISHED
from kvkeep.audit.stolen import Finding, Report
from kvkeep.errors import ConfigError


def report(top1: float, rows: int) -> Report:
    found = Finding(name="x", breaks="y", doubt=0.1, top1=top1)
    return Report(rows=rows, known=0, vocab_size=100, findings=(found,), guesses=())


def test_shares_have_an_interval_within_0_and_1() -> None:
    whole, none, half = (share_of(report(top1, 1000)) for top1 in (1.0, 0.0, 0.5))
    assert 0.995 < whole.low < whole.median == 1.0
    assert none.median == 0.0 < none.high < 0.005
    assert half.low == pytest.approx(0.469, abs=1e-3)
    assert half.high == pytest.approx(0.531, abs=1e-3)


def test_a_part_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no part 'nope'"):
        shield.measure(Options(only=("nope",)))


def test_sizes_of_a_token_are_those_published() -> None:
    assert [one.kv_bytes_per_token >> 10 for one in PUBLISHED] == [1024, 56, 112]
