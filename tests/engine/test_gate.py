from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvkeep.config import Settings
from kvkeep.engine.api import TenantTerms
from kvkeep.engine.gate import MARGIN, QUANTUM_S, YOUNG_EPOCHS, PrefillCost, TtftGate
from kvkeep.errors import ConfigError
from tests.engine.test_sharing import NAMES, built, end_epochs, send, terms, wait_for_scans
from tests.engines import GREEDY, request

EPOCH_S = 60.0
COST = PrefillCost(0.0, 0.001)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """An engine whose first tokens are held back by a clock that stands still."""

    def __init__(self, model: Path, *, gate: bool = True) -> None:
        self.core, self.prompt = built(model, gate=gate)
        self.clock = Clock()
        if self.core.sharing.gate is not None:
            self.core.sharing.gate._clock = self.clock
            self.core.sharing.gate.set_cost(PrefillCost(0.0, 0.0))

    def share(self) -> None:
        """Let the others send the prompt until it is public."""
        for name in NAMES[:-1]:
            send(self.core, name, self.prompt)
        end_epochs(self.core)

    def hold(self) -> None:
        """From now on a prompt costs a millisecond per token."""
        assert self.core.sharing.gate is not None
        self.core.sharing.gate.set_cost(COST)

    def first_token_at(self) -> float:
        """Send the prompt as x; return when the clock must stand for an answer."""
        ask = request(self.prompt, GREEDY, id="timed", tenant="x")
        begun = self.clock.now_s
        self.core.submit(ask)
        for _ in range(200):
            if any(self.core.step() for _ in range(6)):
                break
            self.clock.now_s += QUANTUM_S / 2
        else:
            raise AssertionError("no token ever comes")
        while not self.core.idle():
            self.core.step()
        return self.clock.now_s - begun


def test_what_young_shared_pages_save_does_not_bring_a_first_token_sooner(
    tiny: dict[str, Path],
) -> None:
    world = World(tiny["llama"])
    world.share()
    world.hold()
    hit_s = world.first_token_at()
    assert world.core.counters.saved_tokens >= 512
    assert hit_s == pytest.approx(math.ceil(0.6 / QUANTUM_S) * QUANTUM_S, abs=QUANTUM_S)
    alone = World(tiny["llama"])  # where nobody else has sent anything
    alone.hold()
    assert alone.first_token_at() == pytest.approx(hit_s)
    assert alone.core.counters.saved_tokens == 0


def test_old_shared_pages_and_own_ones_bring_it_sooner(tiny: dict[str, Path]) -> None:
    world = World(tiny["llama"])
    world.share()
    world.hold()
    for epoch in range(2, YOUNG_EPOCHS + 3):
        world.core.end_epoch(EPOCH_S * epoch)
    left = 0.6 - 0.512
    assert world.first_token_at() == pytest.approx(left, abs=2 * QUANTUM_S)
    assert world.first_token_at() <= 2 * QUANTUM_S  # its own pages by now
    world.core.close()


def test_tenants_that_read_no_shared_pages_do_not_wait(tiny: dict[str, Path]) -> None:
    world = World(tiny["llama"])
    world.core.set_tenants(dict.fromkeys(NAMES, 0.1), terms(x=TenantTerms(voter="x")))
    world.hold()
    assert world.first_token_at() == 0.0


def test_without_the_gate_nothing_waits(tiny: dict[str, Path]) -> None:
    world = World(tiny["llama"], gate=False)
    assert world.core.sharing.gate is None
    assert world.first_token_at() == 0.0
    assert world.core.stats().sharing.gate_bits == 0.0


def test_answers_are_those_of_an_engine_without_a_gate(tiny: dict[str, Path]) -> None:
    plain, held = World(tiny["llama"], gate=False), World(tiny["llama"])
    assert send(plain.core, "x", plain.prompt) == send(held.core, "x", held.prompt)


def test_costs_come_from_two_prompts() -> None:
    cost = PrefillCost.of(0.010, 0.522, 513)
    assert cost.call_s == pytest.approx(MARGIN * 0.010)
    assert cost.token_s == pytest.approx(MARGIN * 0.001)
    assert PrefillCost.of(0.02, 0.01, 513).token_s == 0.0


def test_bits_count_the_times_a_first_token_can_have() -> None:
    gate = TtftGate(lambda _: True, EPOCH_S)
    assert gate.bits(1000) == 0.0
    gate.set_cost(COST)
    assert gate.bits(7 * 20 - 1) == pytest.approx(3.0)


def test_a_gate_without_promotion_is_refused() -> None:
    with pytest.raises(ConfigError, match="share_gate"):
        Settings(model="demo", share="isolate", share_gate=True)


def test_an_engine_measures_its_costs(tiny: dict[str, Path]) -> None:
    core, _ = built(tiny["llama"], gate=True)
    wait_for_scans(core.sharing.policy)  # type: ignore[arg-type]
    assert core.stats().sharing.gate_bits > 0
