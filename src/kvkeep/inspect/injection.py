"""Injection: a thief's own engine goes on from stolen pages, and the model says what they hold.

No table of a vocabulary is needed, and no layer is looked at: whoever has the weights and pages as
they were computed asks the model. Pages that were turned by a secret make it say something else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec
import torch

from kvkeep.attention.planner import FlatPlanner
from kvkeep.engine.api import FinishReason, GenerateRequest, SamplingParams
from kvkeep.engine.backend import choose
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.options import EngineOptions, SharingOptions
from kvkeep.errors import EngineError
from kvkeep.eviction.policy import KeepAll
from kvkeep.inspect.watch import TENANT, run_prompt
from kvkeep.ops.layout import Attended, AttentionOps, AttentionPlan, LayerKV, Observe
from kvkeep.quant.codec import Float
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield, Shield
from kvkeep.types import PAGE_TOKENS, Int32Array


class StolenPages(NamedTuple):
    """Whole pages of a prompt as they lay in memory, in the model's dtype."""

    k: torch.Tensor
    """[L, n, Hkv, D], as is `v`."""
    v: torch.Tensor


class InjectingAttention:
    """Attention as ever that stores stolen rows in place of the first ones it is given."""

    def __init__(self, inner: AttentionOps, stolen: StolenPages) -> None:
        self._inner = inner
        self._stolen = stolen
        self._stored: dict[int, int] | None = None
        """By layer: rows so far; None until the thief's own prompt begins."""

    @property
    def bytes_read(self) -> int:
        """Return what was read so far."""
        return self._inner.bytes_read

    def begin(self) -> None:
        """Store stolen rows from now on: an engine's warm-up is over."""
        self._stored = {}

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        """Write the rows, stolen ones in the place of those that came for their positions."""
        if self._stored is not None:
            begin = self._stored.get(kv.layer, 0)
            count = max(0, min(len(k), self._stolen.k.shape[1] - begin))
            self._stored[kv.layer] = begin + len(k)
            own = slice(begin, begin + count)
            k, v = (
                torch.cat([theirs[kv.layer, own].to(mine.dtype), mine[count:]])
                for theirs, mine in ((self._stolen.k, k), (self._stolen.v, v))
            )
        self._inner.append(kv, k, v, slots)

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        """Attend as ever."""
        return self._inner.attend(q, kv, plan, observe)

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge as ever."""
        return self._inner.merge(outs, lse2s)


def steal(options: EngineOptions, shield: Shield, ids: Sequence[int]) -> StolenPages:
    """Run a prompt behind a shield and return its whole pages, all layers."""
    ran = run_prompt(options, Float(), shield, ids)
    pages = [ran.attention.page(number) for number in range(len(ids) // PAGE_TOKENS)]
    k, v = (torch.cat([page[i] for page in pages], 2).transpose(1, 2) for i in (0, 1))
    return StolenPages(k, v)


def inject(
    options: EngineOptions, stolen: StolenPages, question: Sequence[int], tokens: int
) -> list[int]:
    """Return what the public model says to a question after stolen pages, greedily.

    Raises `EngineError` where it can't be run.
    """
    backend = choose(options, options.threads or len(os.sched_getaffinity(0)))
    attention = InjectingAttention(backend.ops.attention, stolen)
    core = build_core(
        msgspec.structs.replace(options, max_num_seqs=1, share=SharingOptions(), guard_share=0.0),
        parts=Parts(
            techniques=Techniques(Float(), NoShield(), KeepAll()),
            planner=FlatPlanner(),
            policy=ShareNothing(),
            backend=replace(backend, ops=replace(backend.ops, attention=attention)),
        ),
    )
    attention.begin()
    core.set_tenants({TENANT: 1.0})
    prompt = (*[0] * stolen.k.shape[1], *question)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    core.submit(
        GenerateRequest(id=TENANT, tenant=TENANT, scope=TENANT, prompt_ids=prompt, params=params)
    )
    said: list[int] = []
    while not core.idle():
        for output in core.step():
            if output.chunk.finish is FinishReason.ERROR:
                raise EngineError(output.chunk.error or "the engine gave up without a reason")
            said += output.chunk.token_ids
    core.close()
    return said
