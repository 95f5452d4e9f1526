"""Which KV heads need four bits for their keys: measured on text, written beside the checkpoint.

A head's cost is what two-bit keys in it alone add to the divergence, all others having four bits.
Divergence is half the mean square change of the log-probability of the text's tokens, in nats: for
text that the model could have written, and for small changes, that is the Kullback-Leibler
divergence of what it predicts, without a vocabulary of numbers per token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvkeep.attention.planner import FlatPlanner
from kvkeep.engine.api import Chunk, FinishReason, GenerateRequest, ModelInfo, SamplingParams
from kvkeep.engine.backend import choose
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.options import EngineOptions, SharingOptions
from kvkeep.errors import ConfigError, EngineError
from kvkeep.eviction.policy import KeepAll
from kvkeep.ops.codes import CODE_BITS
from kvkeep.quant.baselines.base import Dequantised, Stored
from kvkeep.quant.by_head import ByHead
from kvkeep.quant.codec import Codec, Float
from kvkeep.quant.hack import Hack
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import WINDOW_STEP, Layout

FEW: Final = Layout.K2V2
MANY: Final = Layout.K4V2
FEW_BITS: Final = CODE_BITS[FEW].k
MANY_BITS: Final = CODE_BITS[MANY].k
TENANT: Final = "calibrate"
OWN_TEXTS: Final = 4
OWN_TOKENS: Final = 448
"""Of each text that the model writes itself; it is then read twice, so that it may be copied."""
LEAST_TOKENS: Final = 2 * WINDOW_STEP
"""A shorter text sees next to no codes."""
MOST_TOKENS: Final = 2048
"""Longer texts are cut into pieces of it."""

Chosen = NDArray[np.bool_]
"""[L, Hkv]: True where keys have four bits."""
Texts = Sequence[Sequence[int]]


class Goal(NamedTuple):
    """What is asked for; a quality wins."""

    budget_bits: float
    """Mean bits of a key's code over layers and heads."""
    quality: float | None = None
    """Largest divergence, in nats."""


class Found(NamedTuple):
    """A choice and what it was made from; divergences in nats per token."""

    chosen: Chosen
    cost: NDArray[np.float64]
    """[L, Hkv] what two bits in this head alone add."""
    divergence: float
    """Of the choice."""
    many: float
    """Of four bits everywhere."""
    few: float
    """Of two bits everywhere."""
    info: ModelInfo


class Trial:
    """An engine that reads texts under one codec after another."""

    def __init__(self, options: EngineOptions) -> None:
        self._stored = Stored(Hack(MANY))
        own = msgspec.structs.replace(
            options, kv="bf16", max_num_seqs=OWN_TEXTS, share=SharingOptions(), guard_share=0.0
        )
        self._core = build_core(
            own,
            parts=Parts(
                techniques=Techniques(Dequantised(self._stored), NoShield(), KeepAll()),
                planner=FlatPlanner(),
                policy=ShareNothing(),
                backend=choose(own, own.threads or len(os.sched_getaffinity(0))),
            ),
        )
        self._core.set_tenants({TENANT: 1.0})
        self._runs = 0
        self.info = self._core.info

    def own_texts(self) -> list[tuple[int, ...]]:
        """Return texts that the model writes, each of them twice over."""
        length = min(OWN_TOKENS, self.info.max_model_len // 2 - 1)
        begin = self.info.eos_token_ids[:1] or (0,)
        params = [
            SamplingParams(max_tokens=length, temperature=1.0, seed=seed, ignore_eos=True)
            for seed in range(OWN_TEXTS)
        ]
        chunks = self._run(Float(), [(begin, one) for one in params])
        said = [tuple(t for chunk in own for t in chunk.token_ids) for own in chunks]
        return [one * 2 for one in said]

    def logprobs(self, codec: Codec, texts: Texts) -> NDArray[np.float64]:
        """Return the log-probabilities of all texts' tokens, the first window's left out."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        found: list[float] = []
        for chunks in self._run(codec, [(text, params) for text in texts]):
            scores = [s for chunk in chunks for s in chunk.prompt_logprobs or ()]
            found += [s.logprob for s in scores[WINDOW_STEP:] if s is not None]
        values = np.array(found, np.float64)
        if not np.isfinite(values).all():
            raise EngineError("the model's log-probabilities aren't finite: check its weights")
        return values

    def close(self) -> None:
        """End the engine."""
        self._core.close()

    def _run(
        self, codec: Codec, prompts: Sequence[tuple[Sequence[int], SamplingParams]]
    ) -> list[list[Chunk]]:
        """Return each prompt's chunks; nothing that was cached before is found."""
        self._stored.codec = codec
        self._runs += 1
        for number, (ids, params) in enumerate(prompts):
            self._core.submit(
                GenerateRequest(
                    id=str(number),
                    tenant=TENANT,
                    scope=f"{self._runs}/{number}",
                    prompt_ids=tuple(ids),
                    params=params,
                )
            )
        found: list[list[Chunk]] = [[] for _ in prompts]
        while not self._core.idle():
            for name, chunk in self._core.step():
                if chunk.finish is FinishReason.ERROR:
                    raise EngineError(chunk.error or "the engine gave up without a reason")
                found[int(name)].append(chunk)
        return found


def calibrate(
    options: EngineOptions,
    texts: Texts,
    goal: Goal,
    progress: Callable[[int, int], None],
) -> Found:
    """Measure every KV head of every layer and choose; without texts the model writes its own.

    Raises `ConfigError` where a text is too short or four bits everywhere miss the quality.
    """
    check_budget(goal.budget_bits)
    trial = Trial(options)
    try:
        pieces = cut(texts, min(MOST_TOKENS, trial.info.max_model_len)) or trial.own_texts()
        return _choose(trial, pieces, goal, progress)
    finally:
        trial.close()


def cut(texts: Texts, most: int) -> list[tuple[int, ...]]:
    """Return texts in pieces of at most `most` tokens, the ends too short to count left out."""
    for number, text in enumerate(texts):
        if len(text) < LEAST_TOKENS:
            raise ConfigError(
                f"text: the {number + 1}. file has {len(text)} tokens; codes are seen from"
                f" {LEAST_TOKENS} on, give a longer one"
            )
    pieces = [tuple(t[at : at + most]) for t in texts for at in range(0, len(t), most)]
    return [piece for piece in pieces if len(piece) >= LEAST_TOKENS]


def divergence(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Return half the mean square change, in nats."""
    return float(np.square(found - expected).mean() / 2)


def layouts(chosen: Chosen) -> list[list[Layout]]:
    """Return [L][Hkv]."""
    return [[MANY if head else FEW for head in layer] for layer in chosen]


def _choose(trial: Trial, texts: Texts, goal: Goal, progress: Callable[[int, int], None]) -> Found:
    shape = (trial.info.num_layers, trial.info.num_kv_heads)
    expected = trial.logprobs(Float(), texts)

    def measured(chosen: Chosen) -> float:
        return divergence(trial.logprobs(ByHead(layouts(chosen)), texts), expected)

    every = np.ones(shape, np.bool_)
    many, few = measured(every), measured(~every)
    cost = np.zeros(shape)
    for number, at in enumerate(np.ndindex(shape)):
        alone = every.copy()
        alone[at] = False
        cost[at] = measured(alone) - many
        progress(number + 1, every.size)
    order = np.argsort(cost, axis=None)
    if goal.quality is None:
        kept = kept_by_budget(every.size, goal.budget_bits)
        chosen = with_few(shape, order[: every.size - kept])
        return Found(chosen, cost, measured(chosen), many, few, trial.info)
    if many > goal.quality:
        raise ConfigError(
            f"quality: four bits everywhere diverge by {many:.2g} nats; allow more than"
            f" {goal.quality:g}, or serve with --kv k8v8"
        )
    total = many + np.cumsum(np.maximum(cost.ravel()[order], 0.0))
    count = int((total <= goal.quality).sum())
    while True:  # costs need not add up: what is chosen is measured
        chosen = with_few(shape, order[:count])
        found = measured(chosen)
        if found <= goal.quality or not count:
            return Found(chosen, cost, found, many, few, trial.info)
        count -= 1


def check_budget(bits: float) -> None:
    """Raise `ConfigError` where keys can't have so many bits on average."""
    if not FEW_BITS <= bits <= MANY_BITS:
        raise ConfigError(f"budget_bits: {bits:g} must lie between {FEW_BITS} and {MANY_BITS}")


def kept_by_budget(heads: int, budget_bits: float) -> int:
    """Return how many heads have four bits where codes have `budget_bits` on average."""
    return int((budget_bits - FEW_BITS) / (MANY_BITS - FEW_BITS) * heads + 1e-9)


def with_few(shape: tuple[int, int], few: NDArray[np.intp]) -> Chosen:
    """Return a choice of four bits in all but some heads, given by their number."""
    chosen = np.ones(shape, np.bool_)
    chosen.ravel()[few] = False
    return chosen
