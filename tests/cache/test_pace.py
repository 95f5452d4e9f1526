from __future__ import annotations

from kvkeep.cache.pace import BYTES_PER_S, LEAST_S, PART, Pace


def test_long_steps_may_copy_more() -> None:
    times = iter([0.0, 0.001, 0.101, 5.101, 5.101])
    pace = Pace(1 << 20, 16 << 20, lambda: next(times))
    assert pace.budget() == (1 << 20, 0.001 + LEAST_S)
    usual = pace.budget()
    assert abs(usual.most_bytes - BYTES_PER_S // 10) <= 1
    assert usual.end_s == 0.101 + 0.1 * PART
    assert pace.budget() == (16 << 20, 5.101 + 5.0 * PART)
    assert pace.budget().most_bytes == 1 << 20


def test_time_may_be_bounded() -> None:
    times = iter([0.0, 5.0])
    pace = Pace(1, 2, lambda: next(times), most_s=0.001)
    assert pace.budget() == (2, 5.001)


def test_a_budget_is_over_when_its_time_is() -> None:
    times = iter([0.0, 1.0, 1.0, 1.0 + PART])
    pace = Pace(1, 2, lambda: next(times))
    budget = pace.budget()
    assert not pace.over(budget)
    assert pace.over(budget)
