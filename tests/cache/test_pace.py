from __future__ import annotations

from kvkeep.cache.pace import BYTES_PER_S, Pace


def test_long_steps_may_copy_more() -> None:
    times = iter([0.0, 0.001, 0.101, 5.101, 5.101])
    pace = Pace(1 << 20, 16 << 20, lambda: next(times))
    assert pace.budget() == 1 << 20
    assert abs(pace.budget() - BYTES_PER_S // 10) <= 1
    assert pace.budget() == 16 << 20
    assert pace.budget() == 1 << 20
