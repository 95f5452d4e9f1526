"""A decode worker attends to a prompt's pages where the prefill worker holds them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.disagg.afar import AfarPart
from kvkeep.disagg.handover import SplitClient
from kvkeep.disagg.keeper import Keeper, readable
from kvkeep.disagg.options import LinkOptions, check_apart
from kvkeep.disagg.outlet import Outlet
from kvkeep.disagg.prefill import PrefillSide
from kvkeep.disagg.wire import Block, Hold
from kvkeep.disagg.worker import spawn_worker
from kvkeep.engine.api import (
    Chunk,
    ChunkStream,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TenantTerms,
)
from kvkeep.engine.options import EngineOptions, SharingOptions
from kvkeep.errors import ConfigError
from tests.disagg.crews import cluster_of
from tests.disagg.pairs import QUICK, Pair, answer, answers, engine_options, pair_of, until
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, manager_of, request, tokens

DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True, logprobs=2)
LONG = msgspec.structs.replace(DRAWN, max_tokens=150)
PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((200, 400, 1100, 1300))]
APART = msgspec.structs.replace(QUICK, attend_apart=300, answer_s=60.0)
WITHIN_S = 60.0
"""What a loaded machine may take for some seconds' work."""
HELD_FRAME = 30
Attend = Callable[[Outlet, Block, memoryview], None]
SELECTIVE = SharingOptions(policy="selective", k=2, epoch_s=0.2)


def alone(model: Path, params: SamplingParams = DRAWN, **options: Any) -> list[list[Chunk]]:
    """Return one engine's answers to the prompts."""
    core = core_for(model, chunk_tokens=128, threads=1, **options)
    told = drive(core, [request(prompt, params, id=str(i)) for i, prompt in enumerate(PROMPTS)])
    return [told[str(i)] for i in range(len(PROMPTS))]


def said(one: list[Chunk]) -> tuple[object, ...]:
    """Return an answer's tokens, text and log-probabilities."""
    return tokens(one), "".join(c.text for c in one), [p for c in one for p in c.logprobs]


def same(got: list[list[Chunk]], wanted: list[list[Chunk]]) -> bool:
    """Tell whether answers are the same."""
    return [said(one) for one in got] == [said(one) for one in wanted]


def key_file(folder: Path) -> Path:
    """Return a file with what keys and queries are turned by."""
    path = folder / "turns"
    path.touch(mode=0o600)
    path.write_bytes(bytes(range(32)))
    return path


def smaller(engine: EngineOptions, **options: Any) -> EngineOptions:
    """Return an engine's options with half a megabyte for pages, and others."""
    return msgspec.structs.replace(engine, **{"kv_cache_bytes": 512 << 10, **options})


def held_there(pair: Pair) -> int:
    """Return the pages of tenant `a` that the prefill worker holds for somebody."""
    use = manager_of(pair.prefill.core).stats().accounts["a"]
    return use.used_pages - use.unreferenced_pages


@pytest.mark.parametrize(
    ("model", "kv", "shield"),
    [
        ("qwen2", "bf16", "off"),
        ("qwen2", "k2v2", "seal"),
        ("llama", "k4v2", "orth"),
    ],
)
async def test_two_places_answer_as_one(
    tiny: dict[str, Path], tmp_path: Path, model: str, kv: str, shield: str
) -> None:
    options: dict[str, Any] = {"kv": kv, "shield": shield}
    if shield == "orth":
        options["transform_key"] = str(key_file(tmp_path))
    wanted = alone(tiny[model], **options)
    async with pair_of(engine_options(tiny[model], **options), link=APART) as pair:
        asked = [request(prompt, DRAWN, id=str(i)) for i, prompt in enumerate(PROMPTS)]
        got = await answers(pair.client, *asked)
        assert same(got, wanted)
        await pair.quiet(WITHIN_S)
        assert not pair.faults()
        assert pair.sends.keeper.attended_rows > 3 * 11
        whole = 128 if kv != "bf16" else 64
        assert pair.receives.installed_pages == 200 // whole * whole // 64, "the short one's"


async def test_a_prompt_that_the_decode_worker_has_no_room_for(tiny: dict[str, Path]) -> None:
    engine = engine_options(tiny["qwen2"], shield="off")
    wanted = alone(tiny["qwen2"], LONG)
    async with pair_of(engine, other=smaller(engine), link=APART) as pair:
        room = manager_of(pair.decode.core).room("a")
        assert room * 64 < len(PROMPTS[2]), "the test is of something"
        asked = [request(prompt, LONG, id=str(i)) for i, prompt in enumerate(PROMPTS)]
        got = await answers(pair.client, *asked[1:])  # more than fit: some are preempted
        assert same(got, wanted[1:])
        await pair.quiet(WITHIN_S)
        assert manager_of(pair.decode.core).room("a") == room


async def test_what_others_have_made_public_is_read_there_too(tiny: dict[str, Path]) -> None:
    wanted = alone(tiny["qwen2"], kv="k2v2")[1:2]
    engine = engine_options(tiny["qwen2"], kv="k2v2", shield="off", share=SELECTIVE)
    terms = {name: TenantTerms(voter=name, group="g") for name in ("a", "b", "c")}
    async with pair_of(engine, link=APART) as pair:
        await pair.client.set_tenants(dict.fromkeys(terms, 0.3), terms)
        for tenant in terms:
            asked = [
                request(prompt, DRAWN, id=f"{tenant}{i}", tenant=tenant)
                for i, prompt in enumerate(PROMPTS[1:2])
            ]
            assert same(await answers(pair.client, *asked), wanted)
            await asyncio.sleep(0.3)  # an epoch ends in both engines
        await pair.quiet(WITHIN_S)
        assert not pair.faults()


async def test_where_tokens_are_evicted_all_pages_come_here(tiny: dict[str, Path]) -> None:
    wanted = alone(tiny["qwen2"], evict="corm")
    async with pair_of(
        engine_options(tiny["qwen2"], shield="off", evict="corm"), link=APART
    ) as pair:
        asked = [request(prompt, DRAWN, id=str(i)) for i, prompt in enumerate(PROMPTS)]
        assert same(await answers(pair.client, *asked), wanted)
        assert pair.sends.keeper.attended_rows == 0
        assert pair.receives.installed_pages > 0
        kept = msgspec.structs.replace(asked[3], evict=False, id="kept")
        core = core_for(tiny["qwen2"], chunk_tokens=128, threads=1, evict="corm")
        assert same(await answers(pair.client, kept), [drive(core, [kept])["kept"]])
        assert pair.sends.keeper.attended_rows > 0, "what asks to keep all is read there"
        await pair.quiet(WITHIN_S)


class Gate:
    """Holds one frame of rows back, some tokens into an answer, until a test has done its part."""

    def __init__(self, *keepers: Keeper) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        for keeper in keepers:
            keeper._attend = partial(self._hold, keeper._attend)  # type: ignore[method-assign]
        self._frames = 0

    def _hold(self, attend: Attend, outlet: Outlet, block: Block, payload: memoryview) -> None:
        self._frames += 1
        if self._frames == HELD_FRAME:
            self.reached.set()
            assert self.open.wait(WITHIN_S)
        attend(outlet, block, payload)


async def in_the_middle(
    pair: Pair, asked: GenerateRequest | None = None
) -> tuple[asyncio.Task[list[Chunk]], AfarPart, Gate, ChunkStream]:
    """Return an answer under way to the longest prompt, its part, and what keeps it there."""
    gate = Gate(pair.sends.keeper)
    stream = pair.client.submit(asked or request(PROMPTS[3], LONG))
    running = asyncio.create_task(answer(stream))
    await until(gate.reached.is_set, WITHIN_S)
    part = pair.receives.afar.part_of("r")
    assert part is not None
    assert part.state == "there"
    assert held_there(pair) >= part.pages
    return running, part, gate, stream


@pytest.mark.parametrize("how", ["purged", "expired", "late", "link"])
async def test_pages_that_are_lost_in_the_middle_cost_time_and_no_token(
    tiny: dict[str, Path], how: str
) -> None:
    wanted = alone(tiny["qwen2"], LONG)[3]
    async with pair_of(engine_options(tiny["qwen2"], shield="off"), link=APART) as pair:
        running, part, gate, _ = await in_the_middle(pair)
        if how == "purged":
            await pair.client._prefill.purge("a")
        elif how == "expired":
            part.expires_s = 0.0
        elif how == "late":
            with part._there:
                part._end_s = 0.0
                part._there.notify_all()
            await until(lambda: part.state == "lost", WITHIN_S)
        else:
            (outlet,) = pair.sends.outlets
            outlet._thread.loop.call_soon_threadsafe(outlet._channel.close)
        gate.open.set()
        got = await running
        assert part.state == "lost"
        assert said(got) == said(wanted)
        await pair.quiet(WITHIN_S)
        assert held_there(pair) == 0


async def test_without_room_for_what_was_lost_the_request_ends_with_why(
    tiny: dict[str, Path],
) -> None:
    engine = engine_options(tiny["qwen2"], shield="off")
    async with pair_of(engine, other=smaller(engine), link=APART) as pair:
        running, _, gate, _ = await in_the_middle(pair)
        await pair.client._prefill.purge("a")
        gate.open.set()
        last = (await running)[-1]
        assert last.finish is FinishReason.ERROR
        assert last.again
        assert "the worker that held this prompt is lost" in (last.error or "")
        await pair.quiet(WITHIN_S)


@pytest.mark.parametrize("how", ["leaves", "deadline"])
async def test_pages_are_given_back_on_every_way_out(tiny: dict[str, Path], how: str) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off"), link=APART) as pair:
        asked = request(PROMPTS[3], LONG, deadline_s=600.0)
        reading, _, gate, stream = await in_the_middle(pair, asked)
        if how == "leaves":
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await stream.aclose()
            gate.open.set()
        else:
            pair.decode.core._requests["r"].deadline_s = 0.0
            gate.open.set()
            assert (await reading)[-1].finish is FinishReason.DEADLINE
        await pair.quiet(WITHIN_S)
        assert held_there(pair) == 0


async def test_a_request_reads_its_own_scope_and_what_is_public_alone(
    tiny: dict[str, Path],
) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off"), link=APART) as pair:
        running, part, gate, _ = await in_the_middle(pair)
        side, (outlet,) = pair.sends, pair.sends.outlets
        (kept,) = side.keeper._kept.values()
        spec, right = kept.asked.spec, kept.asked.record
        other = msgspec.structs.replace(spec, scope="scope-b", tenant="b")
        for wrong in (
            msgspec.structs.replace(right, tag=bytes(16)),
            msgspec.structs.replace(right, chain=bytes(32)),
            msgspec.structs.replace(right, pages=right.pages + 99),
        ):
            before = len(side.keeper)
            side._keep(outlet, msgspec.structs.replace(wrong, request=99), spec, ended=True)
            assert len(side.keeper) == before
        theirs = Hold(98, right.id, right.pages, right.chain, right.tag)
        side._keep(outlet, theirs, other, ended=True)
        assert len(side.keeper) == 1, "another scope's tag is another tag"
        manager = manager_of(pair.prefill.core)
        match = manager.match(spec.prompt_ids, account="a", scope=spec.scope)
        assert readable(match, spec, right.tag) >= right.pages
        assert readable(match, spec, bytes(16)) == 0
        assert readable(match, other, right.tag) == 0
        own = match.own[3].tag
        match.own[3].tag = manager.match((), account="b", scope="scope-b").tag
        assert readable(match, spec, right.tag) == 3, "a page of another scope ends it"
        match.own[3].tag = own
        gate.open.set()
        await running
        await pair.quiet(WITHIN_S)
        assert part.state == "lost", "nobody goes on reading once it has ended"


def test_what_cannot_be_attended_apart_is_refused_at_start(tiny: dict[str, Path]) -> None:
    engine = engine_options(tiny["qwen2"])
    check_apart(engine, APART)
    for wrong, link, why in (
        ({"kv": "auto"}, APART, "pages of one form only"),
        ({"guard_share": 0.1}, APART, "no guard_share"),
        ({"shield": "tile"}, APART, "another shield than tile"),
        ({"device": "cuda"}, APART, "on a CPU only"),
        ({}, LinkOptions(attend_apart=0), "at least 1"),
    ):
        with pytest.raises(ConfigError, match=f"cluster_attend_apart: .*{why}"):
            check_apart(msgspec.structs.replace(engine, **wrong), link)
    check_apart(msgspec.structs.replace(engine, kv="auto"), QUICK)


async def test_a_cluster_goes_on_with_another_worker_that_computes_the_prompt(
    tiny: dict[str, Path],
) -> None:
    wanted = alone(tiny["qwen2"], LONG)[3]
    few = smaller(engine_options(tiny["qwen2"], shield="off"))
    others = {"decode-0": few, "decode-1": few}
    async with cluster_of(tiny["qwen2"], link=APART, others=others) as cluster:
        sides = [worker.side for worker in cluster.hands.alive()]
        keepers = [side.keeper for side in sides if isinstance(side, PrefillSide)]
        gate = Gate(*keepers)
        asked = request(PROMPTS[3], LONG)
        running = asyncio.create_task(answer(cluster.fleet.submit(asked)))
        await until(gate.reached.is_set, WITHIN_S)
        cluster.hands.kill(cluster.place("prefill", PROMPTS[3]))
        gate.open.set()
        assert said(await running) == said(wanted)
        await cluster.hands.quiet(WITHIN_S)


@pytest.mark.slow
async def test_two_processes_answer_as_one(tiny: dict[str, Path]) -> None:
    wanted = alone(tiny["qwen2"], kv="k2v2")
    engine = engine_options(tiny["qwen2"], kv="k2v2", shield="seal")
    few = smaller(engine, kv_cache_bytes=2 << 20, max_num_seqs=4)
    there, here = spawn_worker("prefill", engine, APART), spawn_worker("decode", few, APART)
    client = SplitClient(there, here, least_tokens=64)
    try:
        await client.info()
        await client.set_tenants({"a": 0.5, "b": 0.5})
        asked = [request(prompt, DRAWN, id=str(i)) for i, prompt in enumerate(PROMPTS)]
        assert same(await answers(client, *asked), wanted)
    finally:
        await client.close()
