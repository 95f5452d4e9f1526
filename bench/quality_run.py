"""A suite answered by an engine under one codec: every item's score, in the order of the suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from bench.quality_late import Late
from bench.quality_suite import BLOCK, COPIED, Context, right
from kvkeep.attention.planner import FlatPlanner
from kvkeep.cache.pool import TilePool
from kvkeep.engine.api import Chunk, GenerateRequest, SamplingParams
from kvkeep.engine.backend import choose
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import EngineError
from kvkeep.eviction.policy import Evictor, KeepAll
from kvkeep.models.text import TextModel
from kvkeep.ops.layout import AttentionOps
from kvkeep.quant.baselines.base import KV, Baseline, Dequantised
from kvkeep.quant.codec import Codec, KVShape, Place
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield

TENANT: Final = "bench"
ANSWER_TOKENS: Final = 10
WAVE: Final = 16
"""Contexts that are asked together."""


class Item(NamedTuple):
    """One question, one copied segment or one block of text."""

    task: str
    context: int
    """Number of its context; items of one are not independent."""
    score: float
    """Between 0 and 1; of text, the mean nats per token."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What all codecs run on."""

    model: Path
    threads: int
    kv_cache_bytes: int = 1 << 29


class Recorder(Baseline):
    """Keeps what it is given, per layer: what levels and tables are learnt from."""

    name = "recorder"

    def __init__(self, layers: int) -> None:
        self.pages: list[list[KV]] = [[] for _ in range(layers)]

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> bytes:
        """Keep k and v, and return nothing."""
        self.pages[place.layer].append((k.clone(), v.clone()))
        return b""

    def decode(self, blob: bytes, shape: KVShape, place: Place) -> KV:
        """Return the last page."""
        k, v = self.pages[place.layer][-1]
        return k, v


Wrap = Callable[[AttentionOps], AttentionOps]


class Asked:
    """An engine under one codec, asked in batches."""

    def __init__(
        self,
        machine: Machine,
        codec: Codec,
        wrap: Wrap | None = None,
        evictor: Evictor | None = None,
    ) -> None:
        """`wrap`: what attention is taken through, to look on; `evictor`: None keeps all."""
        options = EngineOptions(
            model=str(machine.model),
            dtype="bfloat16",
            threads=machine.threads,
            kv_cache_bytes=machine.kv_cache_bytes,
            max_num_batched_tokens=1024,
            chunk_tokens=512,
        )
        backend = choose(options, machine.threads)
        if wrap is not None:
            backend = replace(
                backend, ops=replace(backend.ops, attention=wrap(backend.ops.attention))
            )
        self._core = build_core(
            options,
            parts=Parts(
                techniques=Techniques(codec, NoShield(), evictor or KeepAll()),
                planner=FlatPlanner(),
                policy=ShareNothing(),
                backend=backend,
            ),
        )
        self._core.set_tenants({TENANT: 1.0})
        self._codec = codec
        self._asked = 0
        self.text = TextModel.load(machine.model)
        self.info = self._core.info
        self.shape = KVShape(
            self.info.num_layers,
            self.info.num_kv_heads,
            self.info.head_dim,
            backend.ops.layouts[torch.bfloat16],
        )

    @property
    def pool(self) -> TilePool:
        """Return its pages, which are of one form."""
        (manager,) = self._core.caches.managers.values()
        if not isinstance(manager.pool, TilePool):
            raise TypeError("an engine of one codec has one pool")
        return manager.pool

    @property
    def prompts(self) -> tuple[int, float]:
        """Return the tokens of prompts that might lose some, and those kept at their ends."""
        found = self._core.stats().evict
        return found.prompt_tokens_total, found.prompt_kept_tokens_total

    def answer(
        self, prompts: Sequence[tuple[str, Sequence[int]]], params: SamplingParams
    ) -> list[list[Chunk]]:
        """Return the chunks of prompts given with their scopes."""
        if not isinstance(self._codec, Late):
            return self._answer(prompts, params)
        if params.max_tokens:
            self._answer(prompts, greedy(1))
            self._codec.settle(self.pool, self.shape)
        found = self._answer(prompts, params)
        self._codec.settle(self.pool, self.shape)
        return found

    def _answer(
        self, prompts: Sequence[tuple[str, Sequence[int]]], params: SamplingParams
    ) -> list[list[Chunk]]:
        begin = self._asked
        for scope, ids in prompts:
            self._core.submit(
                GenerateRequest(
                    id=str(self._asked),
                    tenant=TENANT,
                    scope=scope,
                    prompt_ids=tuple(ids),
                    params=params,
                )
            )
            self._asked += 1
        found: list[list[Chunk]] = [[] for _ in prompts]
        while not self._core.idle():
            for name, chunk in self._core.step():
                if chunk.error is not None:
                    raise EngineError(chunk.error)
                found[int(name) - begin].append(chunk)
        return found


def greedy(tokens: int) -> SamplingParams:
    """Return greedy sampling of at most `tokens` tokens."""
    return SamplingParams(max_tokens=tokens, temperature=0.0)


def said(chunks: Sequence[Chunk]) -> tuple[str, tuple[int, ...]]:
    """Return an answer's text and tokens."""
    return "".join(c.text for c in chunks), tuple(t for c in chunks for t in c.token_ids)


def run(asked: Asked, contexts: Sequence[Context], first: int = 0) -> list[Item]:
    """Return every item's score; `first` is the number of the first context."""
    found: list[Item] = []
    numbered = list(enumerate(contexts, first))
    for begin in range(0, len(numbered), WAVE):
        wave = numbered[begin : begin + WAVE]
        found += _probed(asked, [(i, c) for i, c in wave if c.probes])
        found += _talked(asked, [(i, c) for i, c in wave if c.turns])
        found += _scored(asked, [(i, c) for i, c in wave if c.kind == "text"])
    return found


def _probed(asked: Asked, contexts: Sequence[tuple[int, Context]]) -> list[Item]:
    """Store each context once, then ask everything of all of them."""
    asked.answer([(str(i), context.ids) for i, context in contexts], greedy(1))
    pairs = [(i, context, probe) for i, context in contexts for probe in context.probes]
    prompts = [(str(i), (*context.ids, *probe.ids)) for i, context, probe in pairs]
    limit = COPIED if any(probe.copied for _, _, probe in pairs) else ANSWER_TOKENS
    replies = asked.answer(prompts, greedy(limit))
    return [
        Item(probe.task, i, right(probe, *said(chunks)))
        for (i, _, probe), chunks in zip(pairs, replies, strict=True)
    ]


def _talked(asked: Asked, contexts: Sequence[tuple[int, Context]]) -> list[Item]:
    """Hold conversations turn by turn; what the model said stays in them."""
    found: list[Item] = []
    histories = [[{"role": "system", "content": c.turns[0][1]}] for _, c in contexts]
    for turn in range(1, max((len(c.turns) for _, c in contexts), default=0)):
        for history, (_, context) in zip(histories, contexts, strict=True):
            history.append({"role": "user", "content": context.turns[turn][0]})
        prompts = [
            (str(i), asked.text.apply_chat(history))
            for history, (i, _) in zip(histories, contexts, strict=True)
        ]
        replies = asked.answer(prompts, greedy(ANSWER_TOKENS))
        for history, (i, context), chunks in zip(histories, contexts, replies, strict=True):
            content, _ = said(chunks)
            history.append({"role": "assistant", "content": content})
            found.append(Item("chat", i, float(content.strip() == context.turns[turn][1])))
    return found


def _scored(asked: Asked, contexts: Sequence[tuple[int, Context]]) -> list[Item]:
    """Return the nats per token of blocks of text."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    replies = asked.answer([(str(i), context.ids) for i, context in contexts], params)
    found: list[Item] = []
    for (i, _), chunks in zip(contexts, replies, strict=True):
        scores = [s.logprob for c in chunks for s in c.prompt_logprobs or () if s is not None]
        blocks = np.array(scores[: len(scores) // BLOCK * BLOCK]).reshape(-1, BLOCK)
        found += [Item("text", i, -float(block.mean())) for block in blocks]
    return found


def recorded(machine: Machine, contexts: Sequence[Context], layers: int) -> list[list[KV]]:
    """Return pages of K and V per layer, as the model computes them on some contexts."""
    recorder = Recorder(layers)
    asked = Asked(machine, Dequantised(recorder))
    for pages in recorder.pages:
        pages.clear()  # of the engine's warm-up
    asked.answer([(str(i), c.ids) for i, c in enumerate(contexts)], greedy(1))
    return recorder.pages
