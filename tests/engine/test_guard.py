"""The guard's books: a tenant's floor follows from its own requests, in their order."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvkeep.engine.guard import Guard, GuardLimits, Sample, Ticket
from kvkeep.errors import ConfigError
from kvkeep.sharing.state import FileStore, NoStore, StateStore

ALL = GuardLimits(1.0, samples=2, kl_nats=0.1)
BAD, GOOD = 0.5, 0.01


def guard_of(limits: GuardLimits = ALL, steps: int = 3, store: StateStore | None = None) -> Guard:
    guard = Guard(limits, "kept", steps, store or NoStore())
    guard.asleep = False
    return guard


def enter(guard: Guard, tenant: str = "a") -> tuple[int, Sample]:
    epoch, sample = guard.enter(tenant, 100, 4, can=True)
    assert sample is not None
    return epoch, sample


def end(guard: Guard, sample: Sample, kl_nats: float, *, counts: bool = True) -> None:
    while sample.wanted:
        sample.add(kl_nats, agrees=kl_nats < ALL.kl_nats)
    guard.settle(sample, counts=counts)


def floors(guard: Guard, drifts: list[float], tenant: str = "a") -> list[int | None]:
    """Return the floor of each request when all before it have ended."""
    found = []
    for kl_nats in drifts:
        epoch, sample = enter(guard, tenant)
        found.append(guard.floor(tenant, epoch))
        end(guard, sample, kl_nats)
    return found


def test_an_epoch_above_the_threshold_has_effect_from_the_one_after_the_next() -> None:
    assert floors(guard_of(), [BAD, BAD, GOOD, GOOD, GOOD, GOOD, GOOD]) == [0, 0, 0, 0, 1, 1, 1]


def test_one_cause_is_one_step_and_the_next_form_is_judged_by_its_own_samples() -> None:
    said = [BAD] * 12
    assert floors(guard_of(), said) == [0] * 4 + [1] * 4 + [2] * 4


def test_there_is_no_step_beyond_the_last_form() -> None:
    assert floors(guard_of(steps=1), [BAD] * 14)[-1] == 1


def test_it_is_the_mean_over_an_epochs_rows_that_counts() -> None:
    assert floors(guard_of(), [0.15, 0.04] * 4)[-1] == 0
    assert floors(guard_of(), [0.15, 0.06] * 4)[-1] == 1


def test_a_floor_is_told_only_when_all_it_follows_from_has_ended() -> None:
    guard = guard_of()
    entered = [enter(guard) for _ in range(5)]
    assert [guard.floor("a", epoch) for epoch, _ in entered] == [0, 0, 0, 0, None]
    end(guard, entered[0][1], BAD)
    assert guard.floor("a", 2) is None
    end(guard, entered[1][1], BAD)
    assert guard.floor("a", 2) == 1


def test_what_a_client_or_the_time_ended_says_nothing() -> None:
    guard = guard_of()
    for _ in range(2):
        end(guard, enter(guard)[1], BAD, counts=False)
    for _ in range(2):
        end(guard, enter(guard)[1], GOOD)
    assert guard.floor("a", enter(guard)[0]) == 0
    (use,) = guard.stats()
    assert (use.shadowed, use.unshadowed, use.compared_tokens, use.agreed_tokens) == (2, 2, 8, 8)
    assert use.kl_nats == pytest.approx(8 * GOOD)


@given(st.lists(st.booleans(), min_size=12, max_size=24), st.integers(0, 10**6))
def test_who_ends_first_and_what_others_do_changes_nothing(said: list[bool], seed: int) -> None:
    expected = floors(guard_of(), [BAD if bad else GOOD for bad in said])
    guard, draw = guard_of(), random.Random(seed)
    running: list[tuple[Sample, bool]] = []
    found: list[int | None] = []
    for bad in said:
        epoch, sample = enter(guard)
        running.append((sample, bad))
        floors(guard, [BAD] * draw.randrange(3), "b")
        draw.shuffle(running)
        while guard.floor("a", epoch) is None or (running and draw.random() < 0.3):
            ended, drifted = running.pop()
            end(guard, ended, BAD if drifted else GOOD)
        found.append(guard.floor("a", epoch))
    assert found == expected


def test_the_draw_is_the_tenants_own_and_keeps_to_the_share() -> None:
    def drawn(tenant: str, guard: Guard) -> list[bool]:
        return [guard.enter(tenant, 9, 1, can=True).sample is not None for _ in range(4000)]

    limits = GuardLimits(0.05, 2, 0.1)
    alone, shared = drawn("a", guard_of(limits)), guard_of(limits)
    assert drawn("b", shared) != drawn("a", shared) == alone
    assert 150 < sum(alone) < 250
    assert sum(drawn("a", guard_of(GuardLimits(0.0, 2, 0.1)))) == 0


def test_requests_that_cannot_carry_a_shadow_are_counted_and_end_no_epoch() -> None:
    guard = guard_of()
    tickets = [guard.enter("a", 9, 1, can=False) for _ in range(5)]
    assert [(t.epoch, t.sample) for t in tickets] == [(0, None)] * 5
    assert guard.stats()[0].unshadowed == 5


def test_nothing_is_sampled_before_the_first_client() -> None:
    guard = Guard(ALL, "kept", 1, NoStore())
    assert guard.enter("a", 9, 1, can=True) == (0, None)
    assert guard.floor("a", 0) == 0


def test_steps_are_carried_over_a_restart_and_forgotten_with_their_tenant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileStore(tmp_path / "guard", "guard_state")
    with caplog.at_level(logging.WARNING):
        floors(guard_of(store=store), [BAD] * 5)
    assert "tenant a steps back, step 1 of 3: 0.5000 nats and 0.000 of 8 next" in caplog.text
    again = guard_of(store=store)
    assert floors(again, [GOOD] * 6) == [1] * 6
    assert floors(guard_of(steps=0, store=store), [GOOD]) == [0]
    again.forget("a")
    assert floors(again, [GOOD]) == floors(guard_of(store=store), [GOOD]) == [0]


def planted(guard: Guard, beside: Sample, epoch: int, *, told: int, forgotten: int) -> None:
    probe = guard.plant(Ticket(epoch, beside), 120, 4)
    assert probe is not None
    for i in range(told):
        probe.recall(served=i >= forgotten)
    end(guard, probe, GOOD)


@pytest.mark.parametrize(("told", "forgotten", "back"), [(20, 5, 1), (20, 4, 0), (15, 15, 0)])
def test_planted_tokens_that_are_forgotten_take_a_tenant_back(
    told: int, forgotten: int, back: int
) -> None:
    guard = guard_of()
    for said in ((told // 2, 0), (told - told // 2, forgotten)):
        epoch, sample = enter(guard)
        end(guard, sample, GOOD)
        planted(guard, sample, epoch, told=said[0], forgotten=said[1])
    for _ in range(2):
        end(guard, enter(guard)[1], GOOD)
    assert guard.floor("a", enter(guard)[0]) == back
    assert guard.stats()[0].forgotten_tokens > 0


def test_a_probe_belongs_to_its_requests_epoch_and_does_not_lengthen_it() -> None:
    guard = guard_of()
    first, second = enter(guard), enter(guard)
    planted(guard, second[1], second[0], told=4, forgotten=0)
    assert enter(guard)[0] == 1
    waiting = guard.plant(Ticket(*first), 120, 4)
    assert waiting is not None
    for _, sample in (first, second):
        end(guard, sample, BAD)
    enter(guard)
    epoch, _ = enter(guard)
    assert guard.floor("a", epoch) is None, "the probe still runs"
    end(guard, waiting, BAD)
    assert guard.floor("a", epoch) == 1
    assert guard.plant(Ticket(0, None), 120, 4) is None


def test_rows_that_say_nothing_end_a_shadow_too() -> None:
    _, sample = enter(guard_of())
    for _ in range(4):
        assert sample.wanted
        sample.skip()
    assert not sample.wanted
    assert sample.compared == 0


class FullDisk:
    def load(self) -> bytes | None:
        return None

    def save(self, state: bytes) -> None:
        raise OSError("no space left")


def test_a_step_that_cannot_be_saved_is_taken_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert floors(guard_of(store=FullDisk()), [BAD] * 5)[-1] == 1
    assert "guard: steps back could not be saved: OSError" in caplog.text


def test_a_file_that_cannot_be_read_stops_the_start_and_one_of_nonsense_counts_for_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="guard_state: can't read"):
        guard_of(store=FileStore(tmp_path / "folder", "guard_state"))
    (tmp_path / "nonsense").write_bytes(b"\xff{")
    assert floors(guard_of(store=FileStore(tmp_path / "nonsense")), [GOOD]) == [0]
