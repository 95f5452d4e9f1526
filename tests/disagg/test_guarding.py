"""One guard for all workers: its books where they are led, and workers that do what these say."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from kvkeep.disagg.guarding import Guarding, Turn, guarding_of
from kvkeep.engine.api import FinishReason, GenerateRequest, SamplingParams, TenantTerms
from kvkeep.engine.choosing import KEPT
from kvkeep.engine.guarded import Guarded, GuardUse, Said
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from tests.disagg.crews import Cluster, cluster_of
from tests.disagg.pairs import answer, answers, until
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens
from tests.server.fakes import info

BAD, GOOD = 0.5, 0.01


def options(**changes: Any) -> EngineOptions:
    settings = {"kv": "k2v2", "guard_share": 1.0, "guard_samples": 2, "guard_kl": 0.1}
    return EngineOptions(model="", **{**settings, **changes})


def guarding(**changes: Any) -> Guarding:
    found = guarding_of(options(**changes), info())
    assert found is not None
    found.settle(("a", "b"), {})
    return found


def asked(tenant: str = "a", **changes: Any) -> GenerateRequest:
    return msgspec.structs.replace(request([1] * 100, tenant=tenant), **changes)


def said(kl_nats: float, *, probe: bool = False, forgotten: int = 0) -> Said:
    return Said(
        compared=4, agreed=4, recalled=20, forgotten=forgotten, kl_nats=4 * kl_nats, probe=probe
    )


def comes(turn: Turn) -> Guarded | None:
    """Return what a request's next worker is told; None: it waits."""
    waits = turn.comes()
    try:
        waits.send(None)
    except StopIteration as told:
        found: Guarded = told.value
        return found
    waits.close()
    return None


async def tell(turn: Turn, *told: Said) -> None:
    """Let a shadow run, and say what it does."""
    verdict: asyncio.Future[tuple[Said, ...]] = asyncio.get_running_loop().create_future()
    turn.runs(verdict)
    verdict.set_result(told)
    await asyncio.sleep(0)


async def steps(guard: Guarding, drifts: list[float], tenant: str = "a") -> list[int]:
    """Return what each request takes when all before it have ended."""
    found = []
    for kl_nats in drifts:
        turn = guard.enter(asked(tenant))
        told = comes(turn)
        assert told is not None
        found.append(told.steps_back)
        await tell(turn, said(kl_nats))
    return found


def use_of(guard: Guarding, tenant: str = "a") -> GuardUse:
    return next(use for use in guard.stats() if use.tenant == tenant)


async def test_a_drift_has_effect_from_the_epoch_after_the_next_and_on_its_tenant_alone() -> None:
    guard = guarding()
    assert await steps(guard, [BAD, BAD, GOOD, GOOD, GOOD, GOOD]) == [0, 0, 0, 0, 1, 1]
    assert await steps(guard, [GOOD] * 6, "b") == [0] * 6
    use = use_of(guard)
    assert (use.shadowed, use.unshadowed, use.compared_tokens, use.steps_back) == (6, 0, 24, 1)


async def test_what_a_probe_says_belongs_to_its_requests_epoch() -> None:
    guard = guarding(evict="corm")
    for _ in range(2):
        turn = guard.enter(asked())
        await tell(turn, said(GOOD), said(GOOD, probe=True, forgotten=15))
    assert await steps(guard, [GOOD] * 4) == [0, 0, 1, 1]
    assert (use_of(guard).shadowed, use_of(guard).forgotten_tokens) == (6, 30)


async def test_a_request_waits_for_what_its_form_follows_from_and_later_ones_behind_it() -> None:
    guard = guarding(kv="auto", kv_auto_tokens=50)
    turns = [guard.enter(asked()) for _ in range(5)]
    short = guard.enter(asked(prompt_ids=(1,) * 9))
    other = guard.enter(asked("b"))
    assert [comes(turn) is not None for turn in turns] == [True] * 4 + [False]
    assert comes(short) is None, "it can't drift, and does not overtake"
    assert comes(other) is not None
    await tell(turns[1], said(BAD))
    assert comes(turns[4]) is None
    await tell(turns[0], said(BAD))
    told = comes(turns[4])
    assert told is not None
    assert (told.steps_back, told.sampled, told.number) == (1, True, 4)
    then = comes(short)
    assert then is not None
    assert not then.sampled


async def test_who_leaves_does_not_hold_up_others_and_says_nothing() -> None:
    guard = guarding()
    turns = [guard.enter(asked()) for _ in range(7)]
    for turn in (turns[0], turns[1], turns[4]):
        turn.leave()
        turn.leave()
    assert [comes(turn) is not None for turn in turns[5:]] == [True, False]
    await tell(turns[2])
    await tell(turns[3], said(BAD))
    assert comes(turns[6]) is not None, "of four samples that ended one has said anything"
    assert (use_of(guard).shadowed, use_of(guard).unshadowed) == (1, 4)


async def test_a_shadow_is_run_once() -> None:
    guard = guarding()
    turn = guard.enter(asked())
    first = comes(turn)
    verdict: asyncio.Future[tuple[Said, ...]] = asyncio.get_running_loop().create_future()
    turn.runs(verdict)
    again = comes(turn)
    assert first is not None
    assert again is not None
    assert (first.sampled, again.sampled) == (True, False)
    verdict.cancel()
    await asyncio.sleep(0)
    assert use_of(guard).unshadowed == 1


async def test_what_cannot_drift_or_carry_a_shadow_ends_no_epoch() -> None:
    guard = guarding(kv="auto", kv_auto_tokens=150)
    beams = SamplingParams(max_tokens=60, n=2, use_beam_search=True)
    for one in (asked(), asked(params=beams), asked(prompt_ids=(1,) * 200, params=beams)):
        told = comes(guard.enter(one))
        assert told is not None
        assert not told.sampled
    assert [(use.tenant, use.unshadowed) for use in guard.stats()] == [("a", 2)]
    guard.settle(("a",), {"a": TenantTerms(voter="a", coded=False)})
    told = comes(guard.enter(asked(prompt_ids=(1,) * 200)))
    assert told == Guarded()
    keeps = guarding(kv="bf16", evict="corm")
    keeps.settle(("a",), {"a": TenantTerms(voter="a", evict=False)})
    assert comes(keeps.enter(asked())) == Guarded()
    assert comes(guarding(kv="bf16", evict="corm").enter(asked(evict=False))) == Guarded()
    told = comes(guarding(kv="bf16", evict="corm").enter(asked()))
    assert told == Guarded(sampled=True)


async def test_a_tenant_that_goes_is_forgotten_and_its_requests_wait_for_nothing(
    tmp_path: Path,
) -> None:
    state = str(tmp_path / "guard")
    guard = guarding(guard_state=state)
    await steps(guard, [BAD] * 5)
    assert await steps(guarding(guard_state=state), [GOOD]) == [1], "steps outlive who leads"
    running = [guard.enter(asked()) for _ in range(6)]
    assert comes(running[-1]) is None
    guard.settle(("b",), {})
    assert comes(running[-1]) is not None
    await tell(running[0], said(BAD), said(BAD, probe=True))
    assert guard.stats() == ()
    assert await steps(guarding(guard_state=state), [GOOD]) == [0]


@given(st.lists(st.booleans(), min_size=10, max_size=20), st.integers(0, 10**6))
def test_who_ends_first_and_what_others_do_changes_nothing(drifts: list[bool], seed: int) -> None:
    async def shuffled() -> list[int]:
        guard, draw = guarding(), random.Random(seed)
        turns = [guard.enter(asked()) for _ in drifts]
        waiting, found = list(zip(turns, drifts, strict=True)), {}
        while waiting:
            await steps(guard, [BAD] * draw.randrange(3), "b")
            able = [one for one in waiting if comes(one[0]) is not None]
            turn, bad = draw.choice(able)
            told = comes(turn)
            assert told is not None
            found[turn] = told.steps_back
            waiting.remove((turn, bad))
            await tell(turn, said(BAD if bad else GOOD))
        return [found[turn] for turn in turns]

    one_by_one = asyncio.run(steps(guarding(), [BAD if bad else GOOD for bad in drifts]))
    assert asyncio.run(shuffled()) == one_by_one


def test_a_state_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="guard_state: can't read"):
        guarding_of(options(guard_state=str(tmp_path)), info())
    assert guarding_of(None, info()) is None
    assert guarding_of(options(guard_share=0.0), info()) is None


DRAWN = SamplingParams(max_tokens=6, temperature=1.0, seed=7, ignore_eos=True)
DRIFTS: dict[str, Any] = {"kv": "k2v2", "guard_share": 1.0, "guard_samples": 1, "guard_kl": 1e-9}
PROMPTS = [prompt_of(200 + 7 * i, i) for i in range(4)]


def forms(cluster: Cluster, role: str) -> dict[str, int]:
    """Return how many requests were stored in each form, on all workers of a role."""
    found: dict[str, int] = {}
    for worker in cluster.hands.alive():
        if worker.role == role:
            for form, count in worker.core.stats().kv_chosen:
                found[form] = found.get(form, 0) + count
    return found


def guarded(model: Path, **changes: Any) -> Any:
    """Return a cluster of two and two whose tenants are guarded."""
    return cluster_of(model, guard={**DRIFTS, **changes})


async def one_by_one(cluster: Cluster, tenant: str = "a") -> list[list[int]]:
    told = []
    for i, prompt in enumerate(PROMPTS):
        asked = request(prompt, DRAWN, id=f"{tenant}{i}", tenant=tenant)
        told.append(tokens(await asyncio.wait_for(answer(cluster.fleet.submit(asked)), 60)))
    return told


async def test_a_tenant_steps_back_on_all_workers_and_whoever_else_asks_changes_nothing(
    tiny: dict[str, Path],
) -> None:
    plain = core_for(tiny["qwen2"], threads=1, chunk_tokens=128, kv="auto", kv_auto_tokens=10**6)
    kept = drive(
        plain, [request(one, DRAWN, id=str(i)) for i, one in enumerate(PROMPTS)]
    )  # 16-bit pages beside an engine's coded ones
    async with guarded(tiny["qwen2"], guard_share=0.15) as cluster:
        alone = await one_by_one(cluster)
        (use,) = (await cluster.fleet.stats()).guard
        assert (use.tenant, use.shadowed, use.steps_back) == ("a", 2, 1)
        assert forms(cluster, "decode") == {"k2v2": 2}, "samples are answered whole"
        assert forms(cluster, "prefill") == {"k2v2": 1, KEPT: 1}
        assert alone[3] == tokens(kept["3"])
        await cluster.hands.quiet()
    async with guarded(tiny["qwen2"], guard_share=0.15) as cluster:
        others = [request(prompt_of(300, 9 + i), DRAWN, id=f"o{i}", tenant="b") for i in range(6)]
        busy = asyncio.create_task(answers(cluster.fleet, *others))
        requests = [request(one, DRAWN, id=f"a{i}") for i, one in enumerate(PROMPTS)]
        at_once = await answers(cluster.fleet, *requests)
        assert [tokens(chunks) for chunks in at_once] == alone
        await busy
        await cluster.hands.quiet()


async def test_a_worker_that_dies_with_a_sampled_request_says_nothing_of_it(
    tiny: dict[str, Path],
) -> None:
    async with guarded(tiny["qwen2"]) as cluster:
        name = cluster.place("decode", PROMPTS[0])
        stream = cluster.fleet.submit(request(PROMPTS[0], DRAWN))
        got = [await anext(stream)]
        cluster.hands.kill(name)
        got += await asyncio.wait_for(answer(stream), 60)
        assert len(tokens(got)) == DRAWN.max_tokens
        (use,) = (await cluster.fleet.stats()).guard
        assert (use.shadowed, use.unshadowed, use.compared_tokens) == (0, 1, 0)
        told = await one_by_one(cluster)
        assert len(told) == len(PROMPTS), "nobody waits for it"
        (use,) = (await cluster.fleet.stats()).guard
        assert (use.shadowed, use.unshadowed, use.steps_back) == (2, 3, 1), "two epochs later"
        await until(lambda: cluster.serves(name), 30)


async def test_requests_that_fail_or_are_left_hold_nobody_up(tiny: dict[str, Path]) -> None:
    async with guarded(tiny["qwen2"]) as cluster:
        fleet = cluster.fleet
        for i in range(3):  # the third follows from what the first says
            wrong = request([10**6] * 200, DRAWN, id=f"wrong{i}")
            (chunk,) = await asyncio.wait_for(answer(fleet.submit(wrong)), 60)
            assert "outside the vocabulary" in (chunk.error or "")
        name = cluster.place("decode", PROMPTS[0])
        stream = fleet.submit(request(PROMPTS[0], DRAWN))
        got = [await anext(stream)]
        cluster.hands.transports[name].mute = True
        between = fleet.submit(request(PROMPTS[0], DRAWN, id="between"))
        late = fleet.submit(request(PROMPTS[1], DRAWN, id="late", deadline_s=0.1))
        (chunk,) = await asyncio.wait_for(answer(late), 60)
        assert chunk.finish is FinishReason.DEADLINE, "it waits for what the silent one says"
        last = [fleet.submit(request(PROMPTS[2], DRAWN, id=f"last{i}")) for i in range(3)]
        await last.pop().aclose()
        cluster.hands.kill(name)
        told = await asyncio.wait_for(asyncio.gather(*map(answer, (between, *last))), 60)
        got += await asyncio.wait_for(answer(stream), 60)
        assert [len(tokens(one)) for one in (got, *told)] == [DRAWN.max_tokens] * 4
        after = await asyncio.wait_for(one_by_one(cluster), 60)
        assert len(after) == len(PROMPTS)
        assert not fleet.guarding or not fleet.guarding._waiting
        await cluster.hands.quiet()
