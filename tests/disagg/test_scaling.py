"""Workers come and go by load where that is asked for, one at a time and within bounds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvkeep.disagg import scaling
from kvkeep.disagg.members import CrewOptions, Member, Scaling
from kvkeep.disagg.options import Role
from kvkeep.disagg.scaling import scale_by_load, wanted
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


@dataclass
class Played:
    """Whoever leads workers that only count."""

    loads: dict[str, int]
    fails: int = 0
    scaled: list[tuple[str, int]] = field(default_factory=list)
    options: CrewOptions = BY_LOAD

    @property
    def members(self) -> dict[str, Member]:
        """Return one for each load."""
        return {
            name: SimpleNamespace(role=name.partition("-")[0], computing=load)  # type: ignore[misc]
            for name, load in self.loads.items()
        }

    async def scale(self, role: Role, count: int) -> None:
        """Note it; fail as often as told to."""
        self.scaled.append((role, count))
        if len(self.scaled) > self.fails:
            self.loads[f"{role}-{count - 1}"] = 0


async def _played(crew: Any, seconds: float) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await scale_by_load(crew)


async def test_a_role_without_bounds_keeps_its_number() -> None:
    crew = Played({"prefill-0": 3, "decode-0": 50})
    await _played(crew, 0.3)
    assert crew.scaled[:2] == [("prefill", 2), ("prefill", 3)]
    assert len(crew.scaled) == 2


async def test_what_cannot_be_started_is_tried_again() -> None:
    class Full(Played):
        async def scale(self, role: Role, count: int) -> None:
            await super().scale(role, count)
            if len(self.scaled) <= self.fails:
                raise EngineStopped("no room")

    crew = Full({"prefill-0": 2}, fails=2)
    await _played(crew, 0.4)
    assert crew.scaled == [("prefill", 2)] * 3


async def test_a_moment_of_load_is_its_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, slept = Played({"prefill-0": 0}), []

    async def moment(seconds: float) -> None:
        slept.append(seconds)
        crew.loads["prefill-0"] = 2 if len(slept) == 1 else 0

    monkeypatch.setattr(asyncio, "sleep", moment)
    assert await scaling._look(crew) == {"prefill": 0.5, "decode": 0.0}
    assert slept == [0.01] * 4


async def test_workers_come_under_load_and_go_after_it(tiny: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=7, ignore_eos=True)
    prompts = [prompt_of(90 + seed, seed) for seed in range(6)]
    wished = [tokens(chunks) for chunks in alone(tiny["qwen2"], prompts, params)]
    by_load: dict[Role, Scaling] = {"decode": Scaling(most=2, load=0.5)}
    crew = {"prefill": 1, "decode": 1, "scaling": by_load, "scale_s": 0.2}
    async with cluster_of(tiny["qwen2"], crew=crew) as cluster:
        turn = 0
        while "decode-1" not in cluster.serving():
            asked = [request(one, params, id=f"{turn}.{i}") for i, one in enumerate(prompts)]
            got = await answers(cluster.fleet, *asked)
            assert [tokens(chunks) for chunks in got] == wished
            turn += 1
            assert turn < 100
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
        await until(lambda: counted() == (1, 0))
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
