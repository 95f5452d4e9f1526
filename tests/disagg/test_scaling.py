"""Workers come and go by load where that is asked for, one at a time and within bounds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from kvkeep.disagg import scaling
from kvkeep.disagg.members import CrewOptions, Member, Scaling
from kvkeep.disagg.options import Role
from kvkeep.disagg.scaling import look_until, scale_by_load, wanted
from kvkeep.engine.api import SamplingParams
from kvkeep.errors import EngineStopped
from tests.disagg.crews import cluster_of
from tests.disagg.pairs import answer, answers, until
from tests.disagg.test_fleet import alone
from tests.e2e.test_composition import prompt_of
from tests.engines import request, tokens

UP_TO_FOUR = Scaling(most=4, load=2.0)
BY_LOAD = CrewOptions(scaling={"prefill": Scaling(most=3, load=1.0)}, scale_s=0.04, beat_s=0.01)


@pytest.mark.parametrize(
    ("now", "under_way", "then"),
    [
        (1, 0.0, 1),
        (1, 2.0, 1),
        (1, 2.1, 2),
        (1, 100.0, 2),  # one at a time
        (2, 4.1, 3),
        (2, 1.7, 2),  # the other would have nearly enough
        (2, 1.5, 1),
        (4, 100.0, 4),
        (4, 0.0, 3),
        (6, 100.0, 5),  # an operator's doing
    ],
)
def test_one_worker_comes_or_goes_by_what_is_under_way(
    now: int, under_way: float, then: int
) -> None:
    assert wanted(now, 1, under_way, UP_TO_FOUR) == then


@pytest.mark.parametrize(("now", "then"), [(1, 2), (2, 2), (3, 2)])
def test_there_are_never_fewer_than_at_the_start(now: int, then: int) -> None:
    assert wanted(now, 2, 0.0, UP_TO_FOUR) == then


@pytest.mark.parametrize("now", range(1, 5))
def test_no_load_moves_workers_to_and_fro(now: int) -> None:
    """Whoever comes at a load does not go at the same, nor the other way about."""
    for tenth in range(200):
        then = wanted(now, 1, tenth / 10, UP_TO_FOUR)
        assert (wanted(then, 1, tenth / 10, UP_TO_FOUR) - then) * (then - now) >= 0


@pytest.mark.parametrize(("passed", "end"), [(0.0, 1), (0.4, 1), (0.6, 2), (1.2, 2), (1.6, 3)])
def test_intervals_are_fixed_from_the_start(passed: float, end: int) -> None:
    assert look_until(passed * 300.0, 300.0) == end * 300.0


@dataclass
class Played:
    """Whoever leads workers that only count."""

    loads: dict[str, int]
    fails: int = 0
    error: Exception | None = None
    lost: set[str] = field(default_factory=set)
    scaled: list[tuple[str, int]] = field(default_factory=list)
    options: CrewOptions = BY_LOAD

    @property
    def members(self) -> dict[str, Member]:
        """Return one for each load."""
        return {
            name: SimpleNamespace(  # type: ignore[misc]
                role=name.partition("-")[0],
                computing=load,
                state="lost" if name in self.lost else "serving",
            )
            for name, load in self.loads.items()
        }

    async def scale(self, role: Role, count: int, *, now: int | None = None) -> None:
        """Note it; fail as often as told to."""
        assert now == sum(name.startswith(role) for name in self.loads)
        self.scaled.append((role, count))
        if len(self.scaled) <= self.fails:
            if self.error is None:
                await asyncio.Event().wait()
            raise self.error or AssertionError
        if count > now:
            self.loads[f"{role}-{count - 1}"] = 0
        else:
            del self.loads[f"{role}-{count}"]


@asynccontextmanager
async def followed(crew: Played) -> AsyncIterator[None]:
    """Let the workers follow the load for as long."""
    task = asyncio.ensure_future(scale_by_load(crew))
    yield
    assert not task.done(), task
    task.cancel()


async def intervals(crew: Played, count: float) -> None:
    await asyncio.sleep(count * crew.options.scale_s)


async def test_a_role_without_bounds_keeps_its_number() -> None:
    crew = Played({"prefill-0": 3, "decode-0": 50})
    async with followed(crew):
        await until(lambda: len(crew.scaled) == 2)
        await intervals(crew, 3)
    assert crew.scaled == [("prefill", 2), ("prefill", 3)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (EngineStopped("no room"), "there are as many as before: no room"),
        (RuntimeError("a secret"), "RuntimeError at test_scaling.py"),
        (None, "no other came within 0 s"),
    ],
)
async def test_what_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
    said: str,
) -> None:
    monkeypatch.setattr(scaling, "START_S", 0.02)
    crew = Played({"prefill-0": 2}, fails=2, error=error)
    async with followed(crew):
        await until(lambda: len(crew.loads) == 2)
    assert crew.scaled[:3] == [("prefill", 2)] * 3
    assert said in caplog.text
    assert "a secret" not in caplog.text


async def test_none_leaves_while_one_that_died_has_not_come_back() -> None:
    crew = Played({"prefill-0": 0, "prefill-1": 0}, lost={"prefill-0"})
    async with followed(crew):
        await intervals(crew, 4)
        assert not crew.scaled
        crew.lost.clear()
        await until(lambda: bool(crew.scaled))
    assert crew.scaled == [("prefill", 1)]


async def test_one_more_comes_while_one_that_died_has_not() -> None:
    crew = Played({"prefill-0": 3}, lost={"prefill-0"})
    async with followed(crew):
        await until(lambda: bool(crew.scaled))
    assert crew.scaled[0] == ("prefill", 2)


async def test_a_moment_of_load_is_its_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, slept = Played({"prefill-0": 0}), []

    async def moment(seconds: float) -> None:
        slept.append(seconds)
        crew.loads["prefill-0"] = 2 if len(slept) == 1 else 0

    monkeypatch.setattr(asyncio, "sleep", moment)
    end_s = asyncio.get_running_loop().time() + 0.0399
    assert await scaling._look(crew, end_s) == {"prefill": 0.5, "decode": 0.0}
    assert len(slept) == 4


async def test_what_was_decided_for_another_number_is_not_done(tiny: dict[str, Path]) -> None:
    async with cluster_of(tiny["qwen2"], crew={"prefill": 1, "decode": 1}) as cluster:
        crew = cluster.fleet.crew
        await crew.scale("decode", 2, now=3)
        assert "decode-1" not in crew.members
        await crew.scale("decode", 2, now=1)
        assert "decode-1" in crew.members


async def test_a_cluster_ends_while_a_worker_is_awaited(tiny: dict[str, Path]) -> None:
    by_load: dict[Role, Scaling] = {"decode": Scaling(most=2, load=1.0)}
    crew = {"prefill": 1, "decode": 1, "scaling": by_load, "scale_s": 0.05, "epoch_s": 3600.0}
    async with cluster_of(tiny["qwen2"], crew=crew) as cluster:
        members = cluster.fleet.crew.members
        members["decode-0"].computing = 5
        await until(lambda: "decode-1" in members, 30)
        assert members["decode-1"].state == "starting"
    assert cluster.fleet.crew.closed


async def test_workers_come_under_load_and_go_after_it(tiny: dict[str, Path]) -> None:
    params, clock = (
        SamplingParams(max_tokens=24, temperature=1.0, seed=7, ignore_eos=True),
        time.monotonic,
    )
    prompts = [prompt_of(90 + seed, seed) for seed in range(6)]
    wished = [tokens(chunks) for chunks in alone(tiny["qwen2"], prompts, params)]
    by_load: dict[Role, Scaling] = {"decode": Scaling(most=2, load=0.5)}
    crew = {"prefill": 1, "decode": 1, "scaling": by_load, "scale_s": 0.2}
    async with cluster_of(tiny["qwen2"], crew=crew) as cluster:
        turn, end_s = 0, clock() + 60.0
        while "decode-1" not in cluster.serving():
            asked = [request(one, params, id=f"{turn}.{i}") for i, one in enumerate(prompts)]
            got = await answers(cluster.fleet, *asked)
            assert [tokens(chunks) for chunks in got] == wished
            turn += 1
            assert clock() < end_s
        await until(lambda: cluster.serving() == ["decode-0", "prefill-0"], 30)
        assert not any(one.computing for one in cluster.fleet.crew.members.values())
        await asyncio.sleep(0.5)
        assert cluster.serving() == ["decode-0", "prefill-0"]
        await cluster.hands.quiet()


async def test_a_request_counts_where_it_is_waited_for(tiny: dict[str, Path]) -> None:
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    async with cluster_of(tiny["qwen2"], crew={"prefill": 1, "decode": 1}) as cluster:
        members = cluster.fleet.crew.members

        def counted() -> tuple[int, int]:
            return members["prefill-0"].computing, members["decode-0"].computing

        stream = cluster.fleet.submit(request(prompt_of(300, 1), long))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert counted() == (1, 0)
        await first
        await anext(stream)
        assert counted() == (0, 1)
        await stream.aclose()
        assert counted() == (0, 0)
        short = cluster.fleet.submit(request(prompt_of(20, 1), long, id="short"))
        await anext(short)
        assert counted() == (0, 1)
        brief = msgspec.structs.replace(long, max_tokens=2)
        await answer(cluster.fleet.submit(request(prompt_of(20, 2), brief, id="brief")))
        assert counted() == (0, 1)
        await short.aclose()
        assert counted() == (0, 0)


async def test_who_died_is_waited_for_by_nobody(tiny: dict[str, Path]) -> None:
    long = SamplingParams(max_tokens=60, temperature=1.0, seed=7, ignore_eos=True)
    prompt = prompt_of(300, 1)
    (wished,) = alone(tiny["qwen2"], [prompt], long)
    async with cluster_of(tiny["qwen2"], crew={"prefill": 1, "decode": 2}) as cluster:
        members = cluster.fleet.crew.members
        stream = cluster.fleet.submit(request(prompt, long))
        got = [await anext(stream), await anext(stream)]
        name = next(one.name for one in members.values() if one.computing)
        dead = members[name]
        cluster.hands.kill(name)
        got += await answer(stream)
        assert tokens(got) == tokens(wished)
        assert dead.computing == 0
        await until(lambda: name in cluster.serving(), 30)
        assert not any(one.computing for one in members.values())
