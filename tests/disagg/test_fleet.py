"""Many workers answer as one engine, and whoever dies costs time and no token."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import msgspec
import pytest

from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import check_alike
from kvkeep.disagg.options import PaceOptions, Role
from kvkeep.engine.api import Chunk, ChunkStream, FinishReason, SamplingParams, TenantTerms
from kvkeep.engine.client import MessageClient
from kvkeep.errors import ConfigError, EngineError, EngineStopped
from tests.disagg.crews import QUICK_CREW, Cluster, Hands, cluster_of
from tests.disagg.pairs import QUICK, answer, answers, engine_options, until
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens

DRAWN = SamplingParams(max_tokens=24, temperature=1.0, seed=7, ignore_eos=True, logprobs=1)
TWO = SamplingParams(max_tokens=24, temperature=1.0, seed=7, ignore_eos=True, n=2)
PROMPT = prompt_of(400, 5)
SLOW = msgspec.structs.replace(QUICK, pace=PaceOptions(bytes_per_s=4e5))
"""On it the pages of PROMPT take about half a second."""


def alone(model: Path, prompts: list[list[int]], params: SamplingParams) -> list[list[Chunk]]:
    """Return one engine's answers."""
    core = core_for(model, chunk_tokens=128, threads=1)
    told = drive(core, [request(prompt, params, id=str(i)) for i, prompt in enumerate(prompts)])
    return [told[str(i)] for i in range(len(prompts))]


def text(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


async def some(stream: ChunkStream, count: int) -> list[Chunk]:
    """Return a stream's next chunks."""
    return [await anext(stream) for _ in range(count)]


def user_of(cluster: Cluster, role: Role) -> str:
    """Return the worker of a role that a request uses now."""
    members = cluster.fleet.crew.members.values()
    return next(one.name for one in members if one.role == role and one.streams)


async def test_many_workers_answer_as_one_engine(tiny: dict[str, Path]) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate((40, 70, 200, 400, 300, 130))]
    wanted = alone(tiny["qwen2"], prompts, DRAWN)
    async with cluster_of(tiny["qwen2"]) as cluster:
        asked = [request(prompt, DRAWN, id=str(i)) for i, prompt in enumerate(prompts)]
        got = await answers(cluster.fleet, *asked)
        assert [tokens(chunks) for chunks in got] == [tokens(chunks) for chunks in wanted]
        assert [text(chunks) for chunks in got] == [text(chunks) for chunks in wanted]
        await cluster.hands.quiet()
        used = {cluster.place("decode", prompt) for prompt in prompts}
        stats = await cluster.fleet.stats()
        assert len(used) == 2
        assert dict(stats.finished)["length"] == len(prompts)
        assert stats.generation_tokens_total == sum(len(tokens(chunks)) for chunks in got)
        assert stats.prefix_cache_queries_total == sum(map(len, prompts)), "each prompt once"
        assert sum(dict(stats.kv_chosen).values()) == stats.ttft_s.counts[-1] == len(prompts)
        assert [(use.tenant, use.running) for use in stats.tenants] == [("a", 0), ("b", 0)]
        assert {use.name for use in stats.workers} == set(cluster.serving())
        assert all(use.state == "serving" and use.streams == 0 for use in stats.workers)


@pytest.mark.parametrize("told", [0, 1, 9])
async def test_another_decode_worker_goes_on_where_a_dead_one_stood(
    tiny: dict[str, Path], told: int
) -> None:
    (wanted,) = alone(tiny["qwen2"], [PROMPT], DRAWN)
    async with cluster_of(tiny["qwen2"], crew={"again_s": 30.0}) as cluster:
        for length in (400, 60):  # split, and not
            prompt = PROMPT[:length]
            wanted = alone(tiny["qwen2"], [prompt], DRAWN)[0]
            stream = cluster.fleet.submit(request(prompt, DRAWN, id=f"{length}"))
            got = await some(stream, told)
            name = cluster.place("decode", prompt)
            cluster.hands.kill(name)
            got += await asyncio.wait_for(answer(stream), 60)
            assert tokens(got) == tokens(wanted)
            assert text(got) == text(wanted)
            assert [p.logprob for c in got for p in c.logprobs] == [
                p.logprob for c in wanted for p in c.logprobs
            ]
            assert {chunk.cached_tokens for chunk in got} == {got[0].cached_tokens}
            await until(partial(cluster.serves, name), 30)
        await cluster.hands.quiet()


async def test_several_answers_are_told_once_each(tiny: dict[str, Path]) -> None:
    (wanted,) = alone(tiny["qwen2"], [PROMPT], TWO)
    async with cluster_of(tiny["qwen2"]) as cluster:
        stream = cluster.fleet.submit(request(PROMPT, TWO))
        got = await some(stream, 11)
        cluster.hands.kill(user_of(cluster, "decode"))
        got += await asyncio.wait_for(answer(stream), 60)
        for index in (0, 1):
            assert tokens(got, index) == tokens(wanted, index)
            assert text(got, index) == text(wanted, index)


async def test_another_prefill_worker_takes_a_prompt_over(tiny: dict[str, Path]) -> None:
    (wanted,) = alone(tiny["qwen2"], [PROMPT], DRAWN)
    async with cluster_of(tiny["qwen2"], link=SLOW, crew={"again_s": 30.0}) as cluster:
        first = cluster.place("prefill", PROMPT)
        cluster.hands.kill_at_submit(first)
        (got,) = await asyncio.wait_for(answers(cluster.fleet, request(PROMPT, DRAWN)), 60)
        assert tokens(got) == tokens(wanted)
        other = ({"prefill-0", "prefill-1"} - {first}).pop()
        assert cluster.hands.workers[other].core.stats().prompt_tokens_total >= len(PROMPT)
        await cluster.hands.quiet()


async def test_without_prefill_workers_prompts_are_computed_where_they_are_answered(
    tiny: dict[str, Path],
) -> None:
    (wanted,) = alone(tiny["qwen2"], [PROMPT], DRAWN)
    async with cluster_of(tiny["qwen2"], crew={"again_s": 60.0, "prefill": 1}) as cluster:
        cluster.hands.others["prefill-0"] = engine_options(tiny["qwen2"], max_model_len=128)
        cluster.hands.kill("prefill-0")
        (got,) = await asyncio.wait_for(answers(cluster.fleet, request(PROMPT, DRAWN)), 60)
        assert tokens(got) == tokens(wanted)


async def test_requests_wait_for_the_only_decode_worker_to_come_back(
    tiny: dict[str, Path],
) -> None:
    (wanted,) = alone(tiny["qwen2"], [PROMPT], DRAWN)
    async with cluster_of(tiny["qwen2"], crew={"decode": 1}) as cluster:
        stream = cluster.fleet.submit(request(PROMPT, DRAWN))
        got = await some(stream, 3)
        cluster.hands.kill("decode-0")
        got += await asyncio.wait_for(answer(stream), 60)
        assert tokens(got) == tokens(wanted)
        uses = {use.name: use for use in (await cluster.fleet.stats()).workers}
        assert (uses["decode-0"].state, uses["decode-0"].starts) == ("serving", 2)


async def test_a_request_that_nobody_can_answer_ends_with_a_clear_error(
    tiny: dict[str, Path],
) -> None:
    crew = {"decode": 1, "again_s": 60.0, "return_s": 0.2}
    async with cluster_of(tiny["qwen2"], crew=crew) as cluster:
        cluster.hands.others["decode-0"] = engine_options(tiny["qwen2"], max_model_len=128)
        cluster.hands.kill("decode-0")
        with pytest.raises(EngineStopped, match="no decode worker is left"):
            await asyncio.wait_for(answers(cluster.fleet, request(PROMPT, DRAWN)), 60)
        patient = cluster.fleet.crew.options = msgspec.structs.replace(
            cluster.fleet.crew.options, return_s=60.0
        )
        assert patient.return_s == 60.0
        hurried = request(PROMPT, DRAWN, deadline_s=0.2)
        (got,) = await asyncio.wait_for(answers(cluster.fleet, hurried), 30)
        assert got[-1].finish is FinishReason.DEADLINE


async def test_a_request_that_kills_every_worker_is_given_up(tiny: dict[str, Path]) -> None:
    async with cluster_of(tiny["qwen2"]) as cluster:
        asked = cluster.fleet.submit(request(PROMPT[:50], DRAWN))

        def again(name: str, role: Role) -> MessageClient:
            client = cluster.hands(name, role)
            cluster.hands.kill_at_submit(name)
            return client

        cluster.fleet.crew._launch = again
        for name in ("decode-0", "decode-1"):
            cluster.hands.kill_at_submit(name)
        with pytest.raises(EngineStopped, match="each of 4 workers"):
            await asyncio.wait_for(answer(asked), 60)


async def test_a_worker_that_says_nothing_is_given_up(tiny: dict[str, Path]) -> None:
    (wanted,) = alone(tiny["qwen2"], [PROMPT], DRAWN)
    async with cluster_of(tiny["qwen2"], crew={"silence_s": 1.0}) as cluster:
        stream = cluster.fleet.submit(request(PROMPT, DRAWN))
        got = await some(stream, 2)
        cluster.hands.transports[user_of(cluster, "decode")].mute = True
        got += await asyncio.wait_for(answer(stream), 60)
        assert tokens(got) == tokens(wanted)


async def test_a_client_that_leaves_frees_every_worker(tiny: dict[str, Path]) -> None:
    async with cluster_of(tiny["qwen2"], link=SLOW) as cluster:
        for count in (0, 3):
            stream = cluster.fleet.submit(request(PROMPT, DRAWN, id=str(count)))
            reading = asyncio.ensure_future(some(stream, count + 1))
            if count:
                await reading
            else:
                await asyncio.sleep(0)
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            await stream.aclose()
            await cluster.hands.quiet()
        members = cluster.fleet.crew.members.values()
        assert [member.streams for member in members] == [0] * 4
        assert not cluster.fleet._journeys


async def test_a_restarted_worker_ends_its_requests_first(tiny: dict[str, Path]) -> None:
    long = msgspec.structs.replace(DRAWN, max_tokens=64)
    (wanted,) = alone(tiny["qwen2"], [PROMPT], long)
    async with cluster_of(tiny["qwen2"], crew={"drain_s": 60.0}) as cluster:
        stream = cluster.fleet.submit(request(PROMPT, long))
        got = await some(stream, 2)
        name = user_of(cluster, "decode")
        restarting = asyncio.ensure_future(cluster.fleet.crew.restart(name))
        await until(lambda: name not in cluster.serving(), 30)
        assert cluster.place("decode", PROMPT) != name or restarting.done()
        got += await asyncio.wait_for(answer(stream), 60)
        assert tokens(got) == tokens(wanted)
        await asyncio.wait_for(restarting, 60)
        assert name in cluster.serving()
        assert cluster.fleet.crew.members[name].starts == 2
        assert sum(one.starts for one in cluster.fleet.crew.members.values()) == 5


async def test_a_rolling_restart_loses_no_request(tiny: dict[str, Path]) -> None:
    prompts = [prompt_of(90 + seed, seed) for seed in range(12)]
    wanted = alone(tiny["qwen2"], prompts, DRAWN)
    async with cluster_of(tiny["qwen2"], crew={"drain_s": 0.05}) as cluster:
        rolling = asyncio.ensure_future(cluster.fleet.crew.restart_all())
        got = []
        for number, prompt in enumerate(prompts):
            got += await answers(cluster.fleet, request(prompt, DRAWN, id=str(number)))
        await asyncio.wait_for(rolling, 60)
        assert [tokens(chunks) for chunks in got] == [tokens(chunks) for chunks in wanted]
        assert [one.starts for one in cluster.fleet.crew.members.values()] == [2] * 4
        (again,) = await answers(cluster.fleet, request(prompts[0], DRAWN, tenant="b"))
        assert tokens(again) == tokens(wanted[0]), "tenants are settled on new workers too"


async def test_what_is_asked_for_twice_is_done_once_after_the_other(tiny: dict[str, Path]) -> None:
    async with cluster_of(tiny["qwen2"], crew={"prefill": 1, "decode": 1}) as cluster:
        crew = cluster.fleet.crew
        await asyncio.gather(crew.scale("decode", 2), crew.scale("decode", 2))
        assert crew.members["decode-1"].starts == 1
        assert cluster.serving() == ["decode-0", "decode-1", "prefill-0"]


async def test_a_rolling_restart_goes_on_past_a_worker_that_died(tiny: dict[str, Path]) -> None:
    async with cluster_of(tiny["qwen2"], crew={"drain_s": 0.05, "again_s": 5.0}) as cluster:
        crew = cluster.fleet.crew
        cluster.hands.kill("decode-0")
        await until(lambda: crew.members["decode-0"].lost)
        await asyncio.wait_for(crew.restart_all(), 60)
        others = ("decode-1", "prefill-0", "prefill-1")
        assert [crew.members[name].starts for name in others] == [2] * 3


async def test_workers_come_and_go_at_epochs_alone(tiny: dict[str, Path]) -> None:
    async with cluster_of(tiny["qwen2"], crew={"epoch_s": 3600.0}) as cluster:
        crew, prompts = cluster.fleet.crew, [prompt_of(80, seed) for seed in range(40)]
        before = [cluster.place("decode", prompt) for prompt in prompts]
        growing = asyncio.ensure_future(crew.scale("decode", 3))
        await until(lambda: "decode-2" in crew.members, 30)
        assert [cluster.place("decode", prompt) for prompt in prompts] == before
        crew.end_epoch()
        await asyncio.wait_for(growing, 30)
        after = [cluster.place("decode", prompt) for prompt in prompts]
        moved = {there for here, there in zip(before, after, strict=True) if here != there}
        assert moved == {"decode-2"}
        shrinking = asyncio.ensure_future(crew.scale("decode", 2))
        await until(lambda: crew.members["decode-2"].state == "draining", 30)
        assert [cluster.place("decode", prompt) for prompt in prompts] == after
        crew.end_epoch()
        await asyncio.wait_for(shrinking, 30)
        assert "decode-2" not in crew.members
        assert [cluster.place("decode", prompt) for prompt in prompts] == before
        with pytest.raises(ConfigError, match="decode: 0 workers are too few"):
            await crew.scale("decode", 0)


async def test_a_worker_that_differs_does_not_join_and_both_values_are_named(
    tiny: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    other = engine_options(tiny["qwen2"], shield="off", kv="k2v2")
    hands = Hands(engine_options(tiny["qwen2"], shield="off"), QUICK, {"prefill-1": other})
    with pytest.raises(ConfigError, match=r"kv: worker \S+ has 'k?b?\S+ and this cluster"):
        await Fleet.start(hands, QUICK_CREW)
    async with cluster_of(tiny["qwen2"]) as cluster:
        cluster.hands.others["decode-1"] = other
        cluster.hands.kill("decode-1")
        await until(lambda: "kv: worker decode-1 has 'k2v2' and this cluster 'bf16'" in caplog.text)
        assert "decode-1" not in cluster.serving()
        cluster.hands.others.clear()
        await until(lambda: "decode-1" in cluster.serving(), 30)


async def test_workers_that_forget_by_other_rules_do_not_join(tiny: dict[str, Path]) -> None:
    engine = engine_options(tiny["qwen2"], shield="off", evict="corm")
    other = msgspec.structs.replace(engine, evict_window=600)
    hands = Hands(engine, QUICK, {"prefill-1": other})
    with pytest.raises(ConfigError, match=r"evict_rule: worker \S+ has 'window \d+, .* 'window"):
        await Fleet.start(hands, QUICK_CREW)


async def test_versions_that_differ_are_named(tiny: dict[str, Path]) -> None:
    async with cluster_of(tiny["qwen2"], crew={"prefill": 0, "decode": 1}) as cluster:
        info = await cluster.fleet.info()
    assert info.version.startswith("kvkeep ")
    older = msgspec.structs.replace(info, version="kvkeep 0.0.1, wire 0")
    with pytest.raises(
        ConfigError, match=r"version: worker w has 'kvkeep 0.0.1, wire 0' and .*'kv"
    ):
        check_alike(info, older, "w", "decode")
    with pytest.raises(ConfigError, match="link: prefill worker w hands no pages over"):
        check_alike(info, info, "w", "prefill")


async def test_a_purge_reaches_every_worker_and_who_takes_over(tiny: dict[str, Path]) -> None:
    async with cluster_of(tiny["qwen2"]) as cluster:
        prompts = [prompt_of(130, seed) for seed in range(6)]
        asked = [request(prompt, DRAWN, id=str(i)) for i, prompt in enumerate(prompts)]
        await answers(cluster.fleet, *asked)
        await cluster.hands.quiet()
        stream = cluster.fleet.submit(request(PROMPT, DRAWN, id="runs"))
        await some(stream, 2)
        assert (await cluster.fleet.purge("a")).pages >= 2 * len(prompts)
        cluster.hands.kill(user_of(cluster, "decode"))
        await asyncio.wait_for(answer(stream), 60)
        await cluster.hands.quiet()
        for worker in cluster.hands.alive():
            assert worker.core.stats().pages_used == 0, worker.role


async def test_placement_depends_on_nobody_elses_requests(tiny: dict[str, Path]) -> None:
    """Two worlds: what a tenant's prompts are placed on is the same with another and without."""
    prompts = [prompt_of(100, seed) for seed in range(4)]
    told = []
    for other in (False, True):
        async with cluster_of(tiny["qwen2"]) as cluster:
            if other:
                noise = [
                    request(prompt_of(300, 50 + i), DRAWN, id=f"b{i}", tenant="b") for i in range(6)
                ]
                await answers(cluster.fleet, *noise)
            own = []
            for number, prompt in enumerate(prompts * 2):
                (chunks,) = await answers(cluster.fleet, request(prompt, DRAWN, id=str(number)))
                placed = [cluster.place("prefill", prompt), cluster.place("decode", prompt)]
                own.append((placed, tokens(chunks), chunks[-1].cached_tokens))
            told.append(own)
    assert told[0] == told[1]
    assert told[0][-1][2] > 0, "found again"


async def test_a_cluster_that_ends_lets_nobody_wait(tiny: dict[str, Path]) -> None:
    crew = {"prefill": 0, "decode": 1, "again_s": 60.0}
    async with cluster_of(tiny["qwen2"], crew=crew) as cluster:
        cluster.hands.others["decode-0"] = engine_options(tiny["qwen2"], max_model_len=128)
        cluster.hands.kill("decode-0")
        waiting = asyncio.ensure_future(answers(cluster.fleet, request(PROMPT, DRAWN)))
        await until(lambda: not cluster.serving(), 30)
        await asyncio.sleep(0)
        await cluster.fleet.close()
        with pytest.raises(EngineStopped, match="the cluster was stopped"):
            await asyncio.wait_for(waiting, 30)


async def test_a_worker_that_dies_while_it_is_drained_comes_back(tiny: dict[str, Path]) -> None:
    async with cluster_of(tiny["qwen2"], link=SLOW, crew={"drain_s": 60.0}) as cluster:
        stream = cluster.fleet.submit(request(PROMPT, DRAWN))
        got = await some(stream, 1)
        name = user_of(cluster, "decode")
        restarting = asyncio.ensure_future(cluster.fleet.crew.restart(name))
        await until(lambda: cluster.fleet.crew.members[name].state == "draining", 30)
        cluster.hands.kill(name)
        got += await asyncio.wait_for(answer(stream), 60)
        assert len(tokens(got)) == DRAWN.max_tokens
        with pytest.raises(ConfigError, match="died meanwhile"):
            await asyncio.wait_for(restarting, 30)
        await until(partial(cluster.serves, name), 30)
        assert cluster.fleet.crew.members[name].starts == 2


async def test_one_id_runs_once_and_a_closed_cluster_takes_nothing(tiny: dict[str, Path]) -> None:
    crew = {"prefill": 0, "decode": 1}
    async with cluster_of(tiny["qwen2"], crew=crew) as cluster:
        terms = {"a": TenantTerms(voter="a")}
        with pytest.raises(ConfigError):
            await cluster.fleet.set_tenants({"a": 3.0}, terms)
        stream = cluster.fleet.submit(request(PROMPT, DRAWN))
        with pytest.raises(EngineError, match="already running"):
            cluster.fleet.submit(request(PROMPT, DRAWN))
        reading = asyncio.ensure_future(answer(stream))
        await cluster.fleet.close(drain_s=60.0)
        assert len(tokens(await reading)) == DRAWN.max_tokens
        with pytest.raises(EngineStopped):
            cluster.fleet.submit(request(PROMPT, DRAWN))
        with pytest.raises(EngineStopped):
            await cluster.fleet.stats()
