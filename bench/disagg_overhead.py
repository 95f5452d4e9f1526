"""The part `router` of `kvkeep bench disagg`: what a cluster's router adds to a request.

Its workers stand in this process and answer at once, so that all of a request's time is the
router's: placing it, starting it on both workers, handing the first token over, passing chunks on.
Requests come by a Poisson process; time that one waits for another counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import numpy as np

from bench.harness import Figure, Goal, Row, estimate
from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import Role
from kvkeep.engine import messages as m
from kvkeep.engine.api import Chunk, FinishReason, GenerateRequest, ModelInfo, SamplingParams
from kvkeep.engine.client import MessageClient

PROMPT_TOKENS: Final = 1024
ANSWER_TOKENS: Final = 64
"""A chunk each."""
RATE: Final = 50.0
"""Requests a second."""
REQUESTS: Final = 300
ROUNDS: Final = 10
TENANTS: Final = 8
CREW: Final = CrewOptions(prefill=2, decode=2, beat_s=3600.0, silence_s=3600.0)
INFO: Final = ModelInfo(
    name="none",
    path="",
    digest="",
    max_model_len=8192,
    vocab_size=1 << 15,
    dtype="bfloat16",
    num_layers=1,
    num_kv_heads=1,
    head_dim=64,
    num_pages=1,
    bytes_per_token=1,
    kernel="none",
    eos_token_ids=(),
    link="tcp://127.0.0.1:1",
)


class AtOnce:
    """A worker that computes nothing: it has every answer when it is asked."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._waiting: dict[str, GenerateRequest] = {}

    def start(self, deliver: Callable[[m.Reply], None]) -> None:
        """Be ready."""
        self._tell = deliver
        deliver(m.Ready(INFO))

    def send(self, command: m.Command) -> None:
        """Answer."""
        match command:
            case m.SetTenants():
                self._tell(m.TenantsSet(None))
            case m.Submit(request) if self._role == "prefill":
                self._say(request.id, Chunk(token_ids=(1,), finish=FinishReason.LENGTH))
            case m.Submit(request):
                self._waiting[request.id] = request
            case m.Begin(request_id):
                request = self._waiting.pop(request_id)
                for left in reversed(range(request.params.max_tokens - 1)):
                    finish = None if left else FinishReason.LENGTH
                    self._say(request_id, Chunk(text="a", token_ids=(1,), finish=finish))

    def join(self, timeout_s: float) -> None:
        """End."""

    def _say(self, request_id: str, chunk: Chunk) -> None:
        self._tell(m.Outputs(((request_id, chunk),)))


async def _round(fleet: Fleet, number: int, requests: int) -> list[float]:
    """Return how long each of a round's requests took, in milliseconds."""
    draw = np.random.default_rng(number)
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, seed=1)
    clock = asyncio.get_running_loop().time

    async def ask(name: int, at_s: float) -> float:
        await asyncio.sleep(at_s)
        tenant = f"t{name % TENANTS}"
        prompt = tuple(draw.integers(1, INFO.vocab_size, PROMPT_TOKENS).tolist())
        request = GenerateRequest(
            id=f"{number}-{name}", tenant=tenant, scope=tenant, prompt_ids=prompt, params=params
        )
        begun = clock()
        async for _ in fleet.submit(request):
            pass
        return 1e3 * (clock() - begun)

    times = np.cumsum(draw.exponential(1 / RATE, requests)).tolist()
    return await asyncio.gather(*(ask(name, at_s) for name, at_s in enumerate(times)))


async def _rounds(rounds: int, requests: int) -> list[list[float]]:
    fleet = await Fleet.start(lambda _, role: MessageClient(AtOnce(role)), CREW)
    try:
        await fleet.set_tenants({f"t{i}": 1 / TENANTS for i in range(TENANTS)})
        await _round(fleet, 0, requests)
        return [await _round(fleet, 1 + number, requests) for number in range(rounds)]
    finally:
        await fleet.close()


def router_overhead(*, quick: bool) -> tuple[Figure, Row]:
    """Return the figure and what it was made of."""
    rounds, requests = (2, 50) if quick else (ROUNDS, REQUESTS)
    took = asyncio.run(_rounds(rounds, requests))
    late = [float(np.percentile(one, 99)) for one in took]
    row: Row = {
        "part": "router",
        "requests": rounds * requests,
        "requests_per_s": RATE,
        "prompt_tokens": PROMPT_TOKENS,
        "chunks": ANSWER_TOKENS,
        "router_ms_p50": float(np.median(np.concatenate(took))),
        "router_ms_p99": float(np.percentile(np.concatenate(took), 99)),
    }
    return Figure("router_overhead_ms_p99", estimate(late), Goal("<=", 5.0)), row
