"""Small engines for tests: a core driven step by step, in this thread."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from kvkeep.cache.manager import CacheManager
from kvkeep.engine.api import Chunk, GenerateRequest, SamplingParams
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def core_for(
    model: Path,
    *,
    tenants: dict[str, float] | None = None,
    parts: Parts | None = None,
    pages: int = 256,
    page_bytes: int = 0,
    **options: object,
) -> EngineCore:
    """Return a warm core of a checkpoint with `pages` pages and the given tenants' shares."""
    settings = {
        "threads": 2,
        "max_num_batched_tokens": 512,
        "chunk_tokens": 64,
        "shield": "off",
        **options,
    }
    if page_bytes:
        settings["kv_cache_bytes"] = pages * page_bytes
    else:
        settings.setdefault("kv_cache_bytes", 64 << 20)
    core = build_core(EngineOptions(model=str(model), **settings), parts=parts)  # type: ignore[arg-type]
    core.set_tenants(tenants or {"a": 0.5, "b": 0.5})
    return core


def manager_of(core: EngineCore) -> CacheManager:
    """Return the manager of an engine's pages, of the coded ones where it has several."""
    return next(iter(core.caches.managers.values()))


def request(
    prompt: Sequence[int],
    params: SamplingParams = GREEDY,
    *,
    id: str = "r",  # noqa: A002 - the request field's own name
    tenant: str = "a",
    scope: str | None = None,
    deadline_s: float | None = None,
) -> GenerateRequest:
    """Return a request of tenant `tenant` in its own scope."""
    return GenerateRequest(
        id=id,
        tenant=tenant,
        scope=scope or f"scope-{tenant}",
        prompt_ids=tuple(int(t) for t in prompt),
        params=params,
        deadline_s=deadline_s,
    )


def drive(
    core: EngineCore,
    requests: Iterable[GenerateRequest] = (),
    each_step: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Chunk]]:
    """Submit, step until idle and return the chunks per request."""
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for item in requests:
        core.submit(item)
    steps = 0
    while not core.idle():
        each_step(steps)
        for output in core.step():
            chunks[output.request_id].append(output.chunk)
        steps += 1
        assert steps < 10_000, "the engine makes no progress"
        if core.stalled:
            time.sleep(5e-4)  # pages are under way
    return dict(chunks)


def tokens(chunks: Iterable[Chunk], index: int = 0) -> list[int]:
    """Return the token ids of one sequence."""
    return [t for chunk in chunks if chunk.index == index for t in chunk.token_ids]


@functools.lru_cache(maxsize=8)
def oracle(path: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config = GenerationConfig()  # no end of text: every token asked for comes
    return model.eval()


def greedy_oracle(path: Path, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Return transformers' own greedy continuation in float32."""
    with torch.inference_mode():
        out = oracle(path).generate(  # type: ignore[operator]
            torch.tensor([list(prompt)]),
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
            ),
        )
    return [int(t) for t in out[0, len(prompt) :]]
