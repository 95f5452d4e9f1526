"""Our engine as benchmarks drive it: a warm core, stepped in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from kvkeep.engine.api import Chunk, GenerateRequest, SamplingParams
from kvkeep.engine.backend import Backend, choose
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions, KvName, ShieldName
from kvkeep.errors import ConfigError
from kvkeep.models import loader
from kvkeep.models.host import HostedModel
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.cpu_leaf import CpuLeaf

TENANT = "bench"


class Weights(NamedTuple):
    """A model that several engines share, in turn, and its kernels."""

    backend: Backend
    model: HostedModel

    @classmethod
    def of(cls, model: Path, threads: int) -> Weights:
        """Load a model."""
        backend = choose(EngineOptions(model=str(model), dtype="bfloat16"), threads)
        return cls(backend, loader.load(model, dtype="bfloat16", ops=backend.ops))


class Ours:
    """A core with one tenant; every call uses a scope of its own unless told otherwise."""

    def __init__(
        self,
        model: Path,
        *,
        threads: int,
        kv_cache_bytes: int = 2 << 30,
        weights: Literal["float", "int8"] = "float",
        max_num_seqs: int = 64,
        parts: Parts | None = None,
        kv: KvName = "bf16",
        shield: ShieldName | None = None,
    ) -> None:
        options = EngineOptions(
            model=str(model),
            dtype="bfloat16",
            weights=weights,
            kv=kv,
            shield=shield,
            threads=threads,
            kv_cache_bytes=kv_cache_bytes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=1024,
            chunk_tokens=1024,
        )
        self.core: EngineCore = build_core(options, parts=parts)
        self.core.set_tenants({TENANT: 1.0})
        self._count = 0
        self._rng = np.random.default_rng(0)

    def prompt(self, length: int) -> tuple[int, ...]:
        """Return a fresh random prompt."""
        return tuple(int(t) for t in self._rng.integers(1, 50_000, length))

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        scope: str | None = None,
    ) -> None:
        """Queue one request."""
        self._count += 1
        name = str(self._count)
        self.core.submit(
            GenerateRequest(
                id=name,
                tenant=TENANT,
                scope=scope or name,
                prompt_ids=tuple(prompt),
                params=params,
            )
        )

    def step_seconds(self) -> list[float]:
        """Step until idle; return each step's seconds."""
        seconds = []
        while not self.core.idle():
            begun = time.perf_counter()
            self.core.step()
            seconds.append(time.perf_counter() - begun)
        return seconds

    def answer(self, prompt: Sequence[int], params: SamplingParams) -> str:
        """Return the text of one answer."""
        self.submit(prompt, params)
        return "".join(chunk.text for chunk in self._chunks())

    def prompt_scores(self, prompt: Sequence[int]) -> list[float]:
        """Return the log-probability of every prompt token but the first."""
        self.submit(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
        scores = next(iter(self._chunks())).prompt_logprobs or ()
        return [score.logprob for score in scores if score is not None]

    def _chunks(self) -> list[Chunk]:
        found = []
        while not self.core.idle():
            found += [output.chunk for output in self.core.step()]
        return found

    def decode_rate(self, batch: int, tokens: int, context: int = 32) -> float:
        """Return generated tokens per second of a batch, its prefill left out."""
        for _ in range(batch):
            self.submit(self.prompt(context), greedy(tokens + 1))
        seconds = self.step_seconds()
        decodes = seconds[-tokens:]
        return batch * len(decodes) / sum(decodes)

    def prefill_rate(self, tokens: int) -> float:
        """Return prompt tokens per second until the first generated token."""
        self.submit(self.prompt(tokens), greedy(1))
        return tokens / sum(self.step_seconds())


def greedy(tokens: int) -> SamplingParams:
    """Return greedy sampling of exactly `tokens` tokens."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


class KernelGuard:
    """Fails a benchmark in whose timed part our own kernels did not do the work."""

    def __init__(self, core: EngineCore) -> None:
        ops = core.kernels
        if not isinstance(ops.attention, CpuAttention) or not isinstance(ops.leaf, CpuLeaf):
            raise ConfigError(f"kernel: a benchmark needs native kernels, not {ops.name!r}")
        self._core, self._attention, self._leaf = core, ops.attention, ops.leaf
        self._before = self._counts()

    def check(self) -> None:
        """Raise `ConfigError` where a step's layers were not all attended and applied natively."""
        steps, attended, applied = (
            now - then for now, then in zip(self._counts(), self._before, strict=True)
        )
        layers = self._core.info.num_layers
        if attended != steps * layers or applied < steps * layers * 4:
            raise ConfigError(
                f"kernel: {steps} steps of {layers} layers ran {attended} native attention calls"
            )

    def _counts(self) -> tuple[int, int, int]:
        return self._core.counters.steps, self._attention.calls, self._leaf.calls
