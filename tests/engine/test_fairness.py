"""Deficit round robin: turns, deficits, and no loss when the budget ends in the middle of one."""

from __future__ import annotations

from collections import deque

import hypothesis.strategies as st
from hypothesis import given

from kvkeep.engine.fairness import DeficitRoundRobin


def served(queues: dict[str, list[int]], quantum: int, budgets: list[int]) -> list[str]:
    """Return who was served, in order, with one `spend` per budget."""
    left = {name: deque(costs) for name, costs in queues.items()}
    robin = DeficitRoundRobin(quantum)
    robin.set_tenants(list(queues))
    order: list[str] = []

    def take(name: str) -> None:
        left[name].popleft()
        order.append(name)

    for budget in budgets:
        robin.spend(budget, lambda name: left[name][0] if left[name] else None, take)
    return order


def test_equal_work_alternates() -> None:
    assert served({"a": [4] * 3, "b": [4] * 3}, 4, [100]) == ["a", "b"] * 3


def test_small_pieces_share_a_turn_and_large_ones_save_up() -> None:
    order = served({"a": [1] * 8, "b": [8]}, 4, [100])
    assert order == ["a"] * 4 + ["a"] * 4 + ["b"] or order == ["a"] * 8 + ["b"]
    assert order.index("b") == 8


def test_a_budget_that_ends_inside_a_turn_goes_on_there() -> None:
    assert served({"a": [4] * 4, "b": [4] * 4}, 8, [4, 4, 4, 4]) == ["a", "a", "b", "b"]


COSTS = st.lists(st.integers(1, 8), max_size=20)


@given(st.dictionaries(st.sampled_from("abcd"), COSTS, min_size=1), st.integers(8, 32))
def test_everything_is_served_and_nobody_waits_for_long(
    queues: dict[str, list[int]], quantum: int
) -> None:
    order = served(queues, quantum, [64] * 200)
    assert {name: order.count(name) for name in queues} == {n: len(c) for n, c in queues.items()}


@given(st.dictionaries(st.sampled_from("abc"), COSTS, min_size=1), st.integers(8, 16))
def test_how_work_is_cut_into_steps_does_not_change_the_order(
    queues: dict[str, list[int]], quantum: int
) -> None:
    assert served(queues, quantum, [8] * 300) == served(queues, quantum, [10_000])
