"""Room between a tenant's own sequences: who runs goes before who waits."""

from __future__ import annotations

from pathlib import Path

from kvkeep.engine.api import SamplingParams
from tests.e2e.test_composition import parts, prompt_of
from tests.engines import core_for, drive, manager_of, request, tokens
from tests.toys import DelayedTier

LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


def test_pages_on_their_way_make_way_for_who_runs(tiny: dict[str, Path]) -> None:
    runs, waits = prompt_of(150, 1), prompt_of(300, 2)
    tier = DelayedTier(polls=150)
    plain = core_for(tiny["qwen2"]).info.bytes_per_token
    core = core_for(
        tiny["qwen2"],
        tenants={"a": 1.0},
        parts=parts(tier=tier),
        pages=8,
        page_bytes=64 * plain,
    )
    alone = {name: tokens(drive(core_for(tiny["qwen2"]), [request(p, q)])["r"])
             for name, p, q in (("runs", runs, LONG), ("waits", waits, SHORT))}  # fmt: skip
    drive(core, [request(waits, SHORT, id="before")])
    manager_of(core).evict_pages("a", 99)
    assert len(tier.kept) == 4
    core.submit(request(runs, LONG, id="runs"))
    for _ in range(4):
        core.step()
    told = drive(core, [request(waits, SHORT, id="waits")])
    first = [chunk for chunk in told["runs"] if chunk.index == 0]
    assert tokens(first) == alone["runs"][-len(tokens(first)) :]
    assert first[-1].finish == "length"
    assert len(tokens(first)) > 190, "it was not cut short"
    assert tokens(told["waits"]) == alone["waits"]
