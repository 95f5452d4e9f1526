"""The promise: what a tenant sees does not depend on what fewer than k tenants sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from kvkeep.sharing.policies.pinned import SharePinned
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.promotion import Promotion
from kvkeep.types import Chain
from tests.cache.player import prompt
from tests.sharing import worlds as w

CASTS = [(("x0",), ("v0", "v1")), (("x0", "x1"), ("v0",))]
"""Attackers and victims: together k - 1, in both ways."""

Property = Callable[[], None]


def holds(make: w.Make, cast: int, runs: int, *, find: bool = False) -> Property:
    """Return the property of two worlds as a test of that many runs."""
    attackers, victims = CASTS[cast]
    phases = [Phase.generate] if find else [Phase.generate, Phase.shrink]

    @settings(
        max_examples=runs,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(w.scripts(attackers, victims))
    def two_worlds(ops: list[w.Op]) -> None:
        without = [op for op in ops if op.actor not in victims]
        seen = w.transcripts(make, ops, attackers)
        assert seen == w.transcripts(make, without, attackers)

    return two_worlds


SAFE = [w.isolate, w.selective, w.pinned]
RUNS = 150
"""Of each of two casts."""


@pytest.mark.parametrize("cast", [0, 1])
@pytest.mark.parametrize("make", SAFE)
def test_a_tenant_sees_nothing_of_fewer_than_k(make: w.Make, cast: int) -> None:
    holds(make, cast, RUNS)()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cast", [0, 1])
@pytest.mark.parametrize("make", SAFE)
def test_a_tenant_sees_nothing_of_fewer_than_k_at_length(make: w.Make, cast: int) -> None:
    holds(make, cast, 2500)()


@pytest.mark.parametrize("make", [w.share_all, w.safekv, w.salt])
def test_the_unsafe_policies_interfere(make: w.Make) -> None:
    with pytest.raises(AssertionError):
        holds(make, 0, 600, find=True)()


def too_few(setting: w.Setting) -> Promotion:
    """Publish with two votes fewer than the promise is stated for."""
    return setting.promotion(AtLeast(w.K - 2, life_epochs=100_000))


class Immediate(Promotion):
    """Publishes what is offered as soon as it is offered."""

    at_once = True

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        return len(chain)


def immediate(setting: w.Setting) -> Promotion:
    made = setting.promotion(AtLeast(w.K, life_epochs=100_000))
    return Immediate(made._parts, made._limits, clock=lambda: setting.now)


class PinsOffers(SharePinned):
    """Declares public what tenants send."""

    at_once = True

    def offer(self, chain: Chain, tenant: str) -> None:
        self._pins.add(chain)


def pins_offers(setting: w.Setting) -> PinsOffers:
    w.pinned(setting)
    return PinsOffers(setting.pins)


@pytest.mark.parametrize("make", [too_few, immediate, pins_offers])
def test_a_planted_leak_is_seen(make: w.Make) -> None:
    with pytest.raises(AssertionError):
        holds(make, 0, 600, find=True)()


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(w.scripts(("x0",), ("v0", "v1")))
def test_only_time_tells_that_something_is_public(ops: list[w.Op]) -> None:
    """Counts, evictions, room and errors are what they would be without any sharing."""
    assert blind(w.selective, ops) == blind(w.isolate, ops)


def blind(make: w.Make, ops: list[w.Op]) -> list[object]:
    world = w.World(make, ["x0", "v0", "v1"])
    world.run(ops)
    everyone = [note for name in world.tenants for note in world.seen.get(name, [])]
    return [
        note[:2] if isinstance(note, tuple) and note[0] == "open" else note for note in everyone
    ]


def test_the_snapshot_is_used_in_these_tests() -> None:
    world = w.World(w.selective, ["x0"])
    world.play(w.Op("x0", "open", 0, w.TEMPLATE, 3))
    note = world.seen["x0"][0]
    assert isinstance(note, tuple)
    assert note[:3] == ("open", 0, 128)


@pytest.mark.parametrize("restart", [False, True])
def test_pins_are_used_in_these_tests(restart: bool) -> None:
    world = w.World(w.pinned, ["x0"])
    if restart:
        world.play(w.Op("", "restart", 0, (), 0))
    world.play(w.Op("x0", "open", 0, w.TEMPLATE, 3))
    opened = [note for note in world.seen["x0"] if isinstance(note, tuple) and note[0] == "open"]
    assert opened[0][:3] == ("open", 64, 64)


@pytest.mark.parametrize("make", [w.isolate, w.selective, w.dp, w.pinned])
def test_three_subjects_behind_one_gateway_key_are_one_tenant(make: w.Make) -> None:
    seen = []
    for subjects in (0, 3):
        world = w.World(make, ["x0", "gate"])
        for subject in range(subjects):
            world.player.open("gate", f"gate/{subject}", prompt(1, 2))
            world.player.end_views()
        world.end_epoch()
        world.end_epoch()
        for _ in range(3):
            world.player.open("x0", "x0/0", prompt(1, 2))
            world.player.end_views()
            world.end_epoch()
        seen.append(world.seen["x0"])
    assert seen[0] == seen[1]


def test_subjects_of_one_gateway_do_not_read_each_other() -> None:
    world = w.World(w.selective, ["gate"])
    world.player.open("gate", "gate/0", prompt(1, 2))
    world.player.end_views()
    world.end_epoch()
    world.end_epoch()
    match = world.manager.match(prompt(1, 2), account="gate", scope="gate/1")
    assert (match.cached_tokens, match.snapshot) == (0, ())
