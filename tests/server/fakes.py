"""A byte tokenizer, an engine that speaks from a script, and a server around them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from kvkeep.cache.tiers import Room, TierUse
from kvkeep.engine.api import (
    Chunk,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Histogram,
    ModelInfo,
    Purged,
    SharingStats,
    TenantTerms,
    TenantUse,
    TokenLogprob,
)
from kvkeep.engine.guarded import GuardUse
from kvkeep.errors import EngineStopped, InvalidRequest
from kvkeep.sealing import KeyState
from kvkeep.server.text import ChatMessage

VOCAB = 300
MAX_LEN = 512
MODEL = "tiny"
BOS = 256
REPLY = "Hello, wörld!"

DISK = TierUse(
    "disk",
    100,
    40,
    4,
    3,
    2,
    (("queue", 5),),
    (("read:EIO", 6),),
    7,
    Room(free_bytes=1000, read_only=False),
    KeyState("file", "memfd_secret", running=True, answering=False),
)


class ByteText:
    """One token per UTF-8 byte; 256 and up are special."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def apply_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool
    ) -> list[int]:
        if messages[-1]["content"] == "refuse me":
            raise InvalidRequest("the chat template refuses this history", param="messages")
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        return self.encode(text + "<assistant>" * add_generation_prompt, add_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        return "<bos>" if token_id == BOS else self.decode([token_id])

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def info() -> ModelInfo:
    return ModelInfo(
        name=MODEL,
        path="/models/tiny",
        digest="00",
        max_model_len=MAX_LEN,
        vocab_size=VOCAB,
        dtype="float32",
        num_layers=2,
        num_kv_heads=1,
        head_dim=64,
        num_pages=100,
        bytes_per_token=1024,
        kernel="reference",
        eos_token_ids=(257,),
    )


def scored(token_id: int, top: int) -> TokenLogprob:
    """Return a token with `top` alternatives, itself the best."""
    text = ByteText().decode([token_id])
    others = tuple((token_id + i, f"{text}+{i}", -0.5 - i) for i in range(1, top))
    return TokenLogprob(token_id, text, -0.5, ((token_id, text, -0.5), *others) if top else ())


@dataclass
class FakeEngine:
    """Implements `EngineClient`: every request is answered with `reply`, a token per `delay_s`."""

    reply: str = REPLY
    delay_s: float = 0.0
    first_delay_s: float = 0.0
    cached_tokens: int = 0
    unsent_tokens: int = 0
    """Told with the first sequence's last token."""
    fail_with: Callable[[GenerateRequest], Exception | None] = lambda _: None
    mute: bool = False
    """Whether chunks come without text."""
    fail_after: int = 0
    """Tokens before `fail_with` strikes."""
    finish: FinishReason | None = None
    """How every sequence ends, instead of by its script."""
    kv: str | None = None
    """How pages are said to be stored, with every sequence's end."""
    requests: list[GenerateRequest] = field(default_factory=list)
    live: set[str] = field(default_factory=set)
    closed: list[str] = field(default_factory=list)
    """Requests whose iterator was closed before its end."""
    quotas: list[dict[str, float]] = field(default_factory=list)
    terms: list[dict[str, TenantTerms]] = field(default_factory=list)
    purged: list[str] = field(default_factory=list)
    dead: bool = False
    shut: bool = False

    def submit(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        return self._run(request)

    async def _run(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        self.live.add(request.id)
        done = False
        try:
            await asyncio.sleep(self.first_delay_s)
            async for chunk in self._speak(request):
                yield chunk
            done = True
        finally:
            self.live.discard(request.id)
            if not done:
                self.closed.append(request.id)

    async def _speak(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        params = request.params
        raw = self.reply.encode()
        pending = [b""] * params.n
        for step in range(min(len(raw), params.max_tokens)):
            if step == self.fail_after and (error := self.fail_with(request)):
                raise error
            if self.dead:
                raise EngineStopped("the engine has died")
            for index in range(params.n):
                pending[index] += raw[step : step + 1]
                text = ""
                with contextlib.suppress(UnicodeDecodeError):
                    text, pending[index] = pending[index].decode(), b""
                yield self._chunk(request, index, step, text, min(len(raw), params.max_tokens))
            await asyncio.sleep(self.delay_s)

    def _chunk(
        self, request: GenerateRequest, index: int, step: int, text: str, total: int
    ) -> Chunk:
        params, token = request.params, self.reply.encode()[step]
        finish = None
        if step == total - 1:
            natural = FinishReason.LENGTH if total == params.max_tokens else FinishReason.STOP
            finish = self.finish or natural
        prompt_logprobs = None
        if step == 0 and params.prompt_logprobs is not None:
            ids = request.prompt_ids
            prompt_logprobs = (None, *(scored(i, params.prompt_logprobs) for i in ids[1:]))
        return Chunk(
            index=index,
            text="" if self.mute else text,
            token_ids=(token,),
            logprobs=() if params.logprobs is None else (scored(token, params.logprobs),),
            prompt_logprobs=prompt_logprobs,
            finish=finish,
            cached_tokens=self.cached_tokens,
            unsent_tokens=self.unsent_tokens if finish and index == 0 else 0,
            error="the step failed" if finish is FinishReason.ERROR else None,
            kv=self.kv if finish else None,
        )

    async def info(self) -> ModelInfo:
        return info()

    async def stats(self) -> EngineStats:
        if self.dead:
            raise EngineStopped("the engine has died")
        histogram = Histogram(bounds=(0.1, 1.0, math.inf), counts=(1, 2, 3), total=4.5)
        return EngineStats(
            requests_running=len(self.live),
            requests_waiting=2,
            pages_total=100,
            pages_used=25,
            pages_free=75,
            prompt_tokens_total=sum(len(r.prompt_ids) for r in self.requests),
            generation_tokens_total=7,
            prefix_cache_queries_total=11,
            prefix_cache_hits_total=5,
            preemptions_total=1,
            steps_total=9,
            attention_tree_steps_total=2,
            attention_planned_bytes_total=1 << 20,
            attention_flat_bytes_total=1 << 21,
            attention_read_bytes_total=1 << 20,
            finished=(("stop", 3), ("length", 4)),
            ttft_s=histogram,
            tpot_s=histogram,
            e2e_s=histogram,
            step_s=histogram,
            tenants=(
                TenantUse(tenant="acme", quota_pages=50, used_pages=25, running=1, waiting=2),
            ),
            sharing=SharingStats(
                policy="selective",
                epoch=7,
                public_units=3,
                public_pages=12,
                eps_per_day=2.5,
                scanned_bytes=(("acme", 512),),
                alerts=(("probe share", "notify", 1),),
            ),
            guard=(
                GuardUse(
                    tenant="acme",
                    shadowed=5,
                    unshadowed=2,
                    compared_tokens=40,
                    agreed_tokens=38,
                    kl_nats=0.5,
                    steps_back=1,
                ),
            ),
            tiers=(DISK,),
        )

    async def set_tenants(
        self, quotas: dict[str, float], terms: dict[str, TenantTerms] | None = None
    ) -> None:
        self.quotas.append(dict(quotas))
        self.terms.append(dict(terms or {}))

    async def purge(self, tenant: str) -> Purged:
        self.purged.append(tenant)
        return Purged(pages=3, votes=2)

    async def close(self, *, drain_s: float = 0.0) -> None:
        self.shut = True
