"""Workers in processes of their own with pools of their own, and requests played to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from bench.disagg_forms import run_forms
from bench.disagg_load import LEAST_TOKENS, MOST_TOKENS, Played, Variant, handover_s, phases_of
from bench.ours import greedy
from kvkeep.disagg.handover import SplitClient
from kvkeep.disagg.options import LinkOptions, PaceOptions, Role
from kvkeep.engine.api import EngineClient, FinishReason, GenerateRequest
from kvkeep.engine.client import MessageClient
from kvkeep.engine.options import EngineOptions, KvName
from kvkeep.engine.process import PipeTransport, spawn_engine
from kvkeep.engine.speeds import Speeds
from kvkeep.errors import EngineError
from kvkeep.sim.load import Drawn

POOL_BYTES: Final = {"bf16": 2 << 30, "k2v2": 1 << 30}
"""Of a model of `LAYERS` layers."""
LAYERS: Final = 28
MAX_ROWS: Final = 16
CHUNK_TOKENS: Final = 256
PATIENCE_S: Final = 600.0
SILENCE_S: Final = 60.0
"""Coding a form for the link holds its thread, and so its beats."""
VOCABULARY: Final = 50_000
IDLE_S: Final = 1.0
"""Longer than this nobody waits for a load's next request once all before it are answered."""


def engine_options(model: Path, kv: KvName, threads: int, layers: int) -> EngineOptions:
    """Return the options of every worker."""
    return EngineOptions(
        model=str(model),
        dtype="bfloat16",
        threads=threads,
        max_model_len=MOST_TOKENS,
        max_num_seqs=MAX_ROWS,
        chunk_tokens=CHUNK_TOKENS,
        kv=kv,
        kv_cache_bytes=POOL_BYTES[kv] * layers // LAYERS,
        shield="off",
        attention_planner="flat",
    )


@dataclass(slots=True)
class Workers:
    """Who serves one form of pages: two workers, or one."""

    decode: MessageClient
    prefill: MessageClient | None = None
    clients: dict[bool, EngineClient] = field(default_factory=dict)
    """By whether pages are streamed."""
    tenant: str = ""
    _count: int = 0

    def client(self, variant: Variant) -> EngineClient:
        """Return who serves a variant."""
        return self.decode if variant.colocated else self.clients[variant.streamed]

    def all(self) -> list[EngineClient]:
        """Return the clients; the last one's end is that of all workers."""
        return [*self.clients.values()] or [self.decode]

    async def fresh(self, form: str) -> None:
        """Begin with empty caches: a tenant that nobody was before."""
        self._count += 1
        self.tenant = f"{form}.{self._count}"
        await self.all()[-1].set_tenants({self.tenant: 1.0})


def _worker(role: Role, options: EngineOptions, speeds: Speeds | None) -> MessageClient:
    slow = speeds if role == "prefill" else None
    pace = None if slow is None else PaceOptions(bytes_per_s=slow.link_bytes_per_s)
    link = LinkOptions(pace=pace, speeds=speeds, unasked_s=PATIENCE_S, silence_s=SILENCE_S)
    return MessageClient(PipeTransport(partial(run_forms, role, options, link)))


@asynccontextmanager
async def served(*started: Workers) -> AsyncIterator[None]:
    """Wait for workers that were started, and end them."""
    try:
        await asyncio.gather(*(client.info() for one in started for client in one.all()))
        yield
    finally:
        for one in started:
            for client in one.all()[-1:]:
                await client.close()


def pair(
    model: Path, kv: KvName, threads: int, speeds: Speeds | None, layers: int = LAYERS
) -> Workers:
    """Start a prefill and a decode worker, half of the threads each, and a link between them.

    That link is as slow as they are told that it is; None: as fast as this machine's.
    """
    options = engine_options(model, kv, max(1, threads // 2), layers)
    prefill, decode = _worker("prefill", options, speeds), _worker("decode", options, speeds)
    workers = Workers(decode, prefill)
    for streamed in (False, True):
        workers.clients[streamed] = SplitClient(
            prefill,
            decode,
            least_tokens=LEAST_TOKENS,
            patience_s=PATIENCE_S,
            whole=not streamed,
        )
    return workers


def alone(model: Path, threads: int, layers: int = LAYERS) -> Workers:
    """Start one engine that computes prompts in chunks beside its decodes, on all threads."""
    return Workers(spawn_engine(engine_options(model, "bf16", threads, layers)))


def asked(number: int, prompt: int, answer: int, tenant: str) -> GenerateRequest:
    """Return a request whose prompt nobody has sent before."""
    draw = np.random.default_rng([number, prompt, answer])
    return GenerateRequest(
        id=f"{tenant}-{number}",
        tenant=tenant,
        scope=tenant,
        prompt_ids=tuple(draw.integers(1, VOCABULARY, prompt).tolist()),
        params=greedy(answer),
        timed=True,
    )


async def answered(client: EngineClient, request: GenerateRequest, at_s: float) -> Played:
    """Send a request and return what became of it; raises `EngineError` where it failed."""
    sent_s = time.monotonic()
    async with aclosing(client.submit(request)) as stream:
        chunks = [chunk async for chunk in stream]
    ended_s = time.monotonic()
    last = chunks[-1]
    if last.finish is not FinishReason.LENGTH or not last.moments:
        raise EngineError(f"a request of a benchmark ended with {last.finish}: {last.error}")
    there, here = last.moments[0], last.moments[-1]
    return Played(
        prompt_tokens=len(request.prompt_ids),
        answer_tokens=request.params.max_tokens,
        at_s=at_s,
        ttft_s=(there.first_token_s or ended_s) - sent_s,
        jct_s=ended_s - sent_s,
        phases=phases_of(sent_s, ended_s, last.moments),
        split=len(last.moments) > 1,
        handover_s=handover_s(last.moments),
        received_bytes=here.received_bytes,
        received_pages=here.received_pages,
        received_rows_bytes=here.received_rows_bytes,
    )


async def play(workers: Workers, variant: Variant, load: Drawn) -> tuple[Played, ...]:
    """Play a load to empty caches, each request at its time; where nobody waits, time is skipped.

    Between two bursts workers idle for minutes, which tells nothing of them.
    """
    await workers.fresh(variant.form)
    client, clock = workers.client(variant), asyncio.get_running_loop().time
    begun = clock()
    tasks: list[asyncio.Task[Played]] = []
    async with asyncio.TaskGroup() as group:
        rows = zip(*(column.tolist() for column in load), strict=True)
        for number, (at_s, prompt, answer) in enumerate(rows):
            if tasks:
                await asyncio.wait(tasks, timeout=max(0.0, begun + at_s - clock()))
            begun -= max(0.0, begun + at_s - clock() - IDLE_S)
            await asyncio.sleep(begun + at_s - clock())
            request = asked(number, prompt, answer, workers.tenant)
            tasks.append(group.create_task(answered(client, request, at_s)))
    return tuple(task.result() for task in tasks)


async def play_in_turn(workers: Workers, variant: Variant, load: Drawn) -> tuple[Played, ...]:
    """Play a load's requests one after another, each to an idle cluster."""
    await workers.fresh(variant.form)
    client, found = workers.client(variant), []
    for number, (prompt, answer) in enumerate(zip(load.prompt_tokens, load.answer_tokens)):
        request = asked(number, int(prompt), int(answer), workers.tenant)
        found.append(await answered(client, request, 0.0))
    return tuple(found)
