"""Partition selection: the odds that one tenant more or less can change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import ClassVar

import pytest

from kvkeep.errors import ConfigError
from kvkeep.sharing.ledger import Key, Unit
from kvkeep.sharing.members import Member
from kvkeep.sharing.policies.dp import Noisy, publish_probability
from kvkeep.sharing.promotion import Promotion
from kvkeep.sharing.snapshot import Entry
from tests.sharing.nodes import SIX, Blocks, end_epochs
from tests.sharing.worlds import Setting

PAIRS = [(0.5, 1e-6), (1.0, 1e-6), (1.0, 1e-4), (2.0, 1e-6), (4.0, 1e-6)]


@pytest.mark.parametrize(("eps", "delta"), PAIRS)
def test_neither_outcome_tells_more_than_eps_and_delta_allow(eps: float, delta: float) -> None:
    odds = math.exp(eps)
    for n in range(1, 60):
        few, more = publish_probability(n - 1, eps, delta), publish_probability(n, eps, delta)
        assert more <= odds * few + delta + 1e-12
        assert 1 - few <= odds * (1 - more) + delta + 1e-12
        assert more >= few


@pytest.mark.parametrize(
    ("eps", "delta", "counts"),
    [(1.0, 1e-6, (10, 14, 18)), (1.0, 1e-4, (6, 10, 13)), (2.0, 1e-6, (6, 8, 10))],
)
def test_it_publishes_as_much_as_is_allowed(
    eps: float, delta: float, counts: tuple[int, int, int]
) -> None:
    for wanted, n in zip((0.01, 0.5, 0.99), counts):
        first = next(i for i in range(100) if publish_probability(i, eps, delta) >= wanted)
        assert abs(first - n) <= 1
    assert publish_probability(0, eps, delta) == 0.0
    assert publish_probability(200, eps, delta) == 1.0


def noisy(setting: Setting, key: int, eps: float = 4.0, **changes: float) -> Promotion:
    rule = Noisy(
        key.to_bytes(16, "little"), eps, changes.get("delta", 1e-3), int(changes.get("window", 2))
    )
    return setting.promotion(rule)


EPS, DELTA, WINDOW = 1.0, 0.05, 4
KEYS = 400


def published(rule: Noisy, voters: str, reader: str) -> bool:
    """Tell whether a reader finds a unit in the last epoch of the window after its votes."""
    setting = Setting()
    setting.directory.set({name: Member(name, "all") for name in SIX})
    policy = setting.promotion(rule)
    for name in voters:
        policy.offer(Blocks(1), name)
    end_epochs(policy, 2 * WINDOW - 1)
    return policy.public_len(Blocks(1), reader) == 1


def share(rule: type[Noisy], voters: str, reader: str) -> float:
    """Return how often that is so, over many keys."""
    rules = (rule(key.to_bytes(16, "little"), EPS, DELTA, WINDOW) for key in range(KEYS))
    return sum(published(one, voters, reader) for one in rules) / KEYS


def check_the_odds(rule: type[Noisy]) -> None:
    """With one voter more, as an account sees it that sent nothing, and one that sent it too."""
    for voters in ("a", "ab", "abc"):
        for reader in ("f", "a"):
            without, with_victim = share(rule, voters[:-1], reader), share(rule, voters, reader)
            spread = [max(p * (1 - p), 0.01) for p in (without, with_victim)]
            slack = 4 * math.sqrt((math.exp(2 * EPS) * spread[0] + spread[1]) / KEYS)
            assert with_victim <= math.exp(EPS) * without + DELTA + slack
            slack = 4 * math.sqrt((spread[0] + math.exp(2 * EPS) * spread[1]) / KEYS)
            assert 1 - without <= math.exp(EPS) * (1 - with_victim) + DELTA + slack


def test_the_odds_with_and_without_a_victim_stay_within_the_bound() -> None:
    check_the_odds(Noisy)


def test_it_is_public_as_often_as_it_says() -> None:
    """An account's own vote does not count for it."""
    for reader, others in (("f", 3), ("a", 2)):
        exact = publish_probability(others, EPS, DELTA)
        found = share(Noisy, "abc", reader)
        assert abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / KEYS)


class Redraws(Noisy, frozen=True):
    """Draws again at every epoch's end; what was public stays so."""

    times: ClassVar[Iterator[int]] = itertools.count()

    def decide(
        self, units: Mapping[Key, Unit], changed: AbstractSet[Key], closed: int, now: int
    ) -> dict[Key, Entry | None]:
        drawn = {key: self._entry(key, unit, now) for key, unit in units.items()}
        return {key: entry for key, entry in drawn.items() if entry is not None}

    def _draw(self, key: Key, window: int) -> float:
        return super()._draw(key, next(self.times))


class DrawsNothing(Noisy, frozen=True):
    """Has one draw for all keys, so that a number of tenants decides."""

    def _draw(self, key: Key, window: int) -> float:
        return 0.5


@pytest.mark.parametrize("rule", [Redraws, DrawsNothing])
def test_a_planted_fault_is_outside_the_bound(rule: type[Noisy]) -> None:
    with pytest.raises(AssertionError):
        check_the_odds(rule)


def test_a_windows_draw_is_one_and_the_next_windows_another() -> None:
    rule = Noisy(b"k" * 16, 1.0, 1e-3, 10)
    unit = Unit((b"u",), None, 0, {str(i): 5 for i in range(8)})
    draws = [rule._draw(("all", b"u"), window) for window in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert rule._draw(("all", b"v"), 1) != draws[0]
    assert rule.decide({("all", b"u"): unit}, set(), 5, 6) == {}
    first, again = (rule.decide({("all", b"u"): unit}, set(), 9, 10) for _ in range(2))
    assert first == again


def test_the_decision_lasts_one_window() -> None:
    setting = Setting()
    setting.directory.set({name: Member(name, "all") for name in SIX})
    policy = noisy(setting, 1, eps=16.0, delta=0.09, window=4)
    for name in "abcde":
        policy.offer(Blocks(1), name)
    end_epochs(policy, 4)
    assert policy.public_len(Blocks(1), "f") == 1
    end_epochs(policy, 3)
    assert policy.public_len(Blocks(1), "f") == 1
    end_epochs(policy)
    assert policy.public_len(Blocks(1), "f") == 0


def test_a_days_cost_is_said() -> None:
    setting = Setting()
    policy = setting.promotion(Noisy(b"k", 1.0, 1e-6, 60), units_per_day=240)
    assert policy.units_per_period == 10
    assert Noisy(b"k", 1.0, 1e-6, 60).eps_total(10, 1440) == 240.0


@pytest.mark.parametrize(
    ("eps", "delta", "window", "word"),
    [(0.0, 1e-6, 9, "eps"), (17, 1e-6, 9, "eps"), (1, 0.0, 9, "delta"), (1, 1e-6, 1, "life")],
)
def test_settings_without_meaning_are_refused(
    eps: float, delta: float, window: int, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        Noisy(b"k", eps, delta, window)
