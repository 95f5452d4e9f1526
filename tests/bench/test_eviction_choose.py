"""Choosing: which rule is best, and seeds that are answered a part after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench import eviction_parts, harness
from bench.eviction_choose import SURE, Tried, in_order, tried
from bench.eviction_lengths import of_length
from bench.eviction_parts import Enough, Learner, Told, joined, of_seed
from bench.eviction_policies import Masks, everything
from bench.eviction_suite import of_recall, read
from bench.eviction_tally import Found, Tally, World, items_of, loss_of
from bench.harness import Estimate
from bench.quality_run import Item


def one(kept: float, high: float) -> Tried:
    return Tried(kept, 1 - kept, Estimate(0.0, 0.0, high, 1), 0.0)


def test_who_surely_loses_little_comes_first_by_what_it_keeps() -> None:
    told = {"a": one(0.25, SURE), "b": one(0.2, SURE), "c": one(0.1, 0.02), "d": one(0.2, 0.01)}
    assert in_order(told, 0.25) == ["b", "a", "d", "c"]
    much = {"e": one(0.4, 0.01), "f": one(0.5, SURE), "g": one(0.3, SURE)}
    assert in_order({**much, **told}, 0.25) == ["b", "a", "d", "c", "g", "f", "e"]


def told(scores: Sequence[float], task: str = "m/t") -> Told:
    items = [Item(task, i, score) for i, score in enumerate(scores)]
    return Told(items, [0.25] * len(scores), [(1.0, 4.0, 9.0)] * len(scores))


def test_seeds_are_joined_and_come_apart_again() -> None:
    parts = [
        {"full": {"m": told([1.0] * 4)}, "ours": {"m": told(scores)}}
        for scores in ([1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0])
    ]
    found = joined(parts, ["m"])
    assert len({item.context for item in items_of(found, "ours")}) == 8
    assert loss_of(found, "ours").median == pytest.approx(0.25)
    assert [loss_of(of_seed(found, n), "ours").median for n in (0, 1)] == [0.0, 0.5]
    result = tried(found, "ours", 2)
    assert (result.kept, result.removed) == pytest.approx((0.25, 0.75))
    highs = [loss_of(of_seed(found, n), "ours").high for n in (0, 1)]
    assert result.one == pytest.approx(sum(highs) / 2)
    assert result.one > result.loss.high / 2


def test_a_rule_is_chosen_by_tasks_that_a_model_can_nearly_do() -> None:
    nearly, hardly = told([1.0] * 9 + [0.0], "m/nearly"), told([1.0] * 8 + [0.0] * 2, "m/hardly")
    part = {"full": {"m": Told(nearly.items + hardly.items, [1.0], [(1.0, 1.0, 1.0)])}}
    assert {item.task for item in items_of(joined([part], ["m"]), "full")} == {"m/nearly"}
    assert len({item.task for item in items_of(joined([part], []), "full")}) == 2


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were answered, by a stand-in."""
    answered: list[int] = []

    def gathered(
        _protocol: str,
        models: object,
        policies: dict[str, Masks],
        *,
        seeds: tuple[int, ...],
        **_: object,
    ) -> Found:
        answered.extend(seeds)
        tally = Tally([Item("m/t", 0, 1.0)], [torch.ones(2, 2)], [(1.0, 2.0, 3.0)])
        return {name: {"m": tally} for name in policies}

    monkeypatch.setattr(eviction_parts, "gathered", gathered)
    monkeypatch.setattr(harness, "commit", lambda: "0" * 40)
    return answered


def test_choosing_goes_on_where_it_stopped(asked: list[int], tmp_path: Path) -> None:
    world = World("m", None, lambda *_: [], gated=True)  # type: ignore[arg-type]
    rules = {"ours": everything}
    for answered in ([5], [5, 6]):
        learner = Learner([world], (5, 6, 7), folder=tmp_path, parts=1)
        with pytest.raises(Enough):
            learner.tried("after", "rules", rules, (5, 6, 7), twice=True)
        assert asked == answered
    learner = Learner([world], (5, 6, 7), folder=tmp_path)
    found = learner.tried("after", "rules", rules, (5, 6, 7), twice=True)
    assert asked == [5, 6, 7]
    assert len(items_of(found, "ours")) == len(items_of(found, "full")) == 3
    learner.tried("before", "rules", rules, (5,), twice=True)
    assert asked == [5, 6, 7, 5], "of another protocol nothing was kept"


def test_nothing_is_kept_of_a_tree_with_changes(
    asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "commit", lambda: "0" * 40 + "-dirty")
    world = World("m", None, lambda *_: [])  # type: ignore[arg-type]
    for _ in range(2):
        Learner([world], (5,), folder=tmp_path).tried("after", "x", {}, (5,), twice=False)
    assert asked == [5, 5]


def test_longer_contexts_are_of_the_length_that_is_asked_for() -> None:
    suite = of_length(read(), 3072, 2)
    made = of_recall(suite, reseed=1)
    assert {len(context.ids) for context in made} == {3072}
    assert {context.kind for context in made} == {"needle", "mqar", "values", "copy"}
