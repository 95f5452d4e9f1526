"""Room between a tenant's own sequences: who runs goes before who waits."""

from __future__ import annotations

from pathlib import Path

from kvkeep.engine.api import Chunk, SamplingParams
from kvkeep.engine.engine import EngineCore
from tests.e2e.test_composition import parts, prompt_of
from tests.engines import core_for, drive, manager_of, request, tokens
from tests.toys import DelayedTier

LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
SOME = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
RUNS, WAITS = prompt_of(150, 1), prompt_of(300, 2)


def test_pages_on_their_way_make_way_for_who_runs(tiny: dict[str, Path]) -> None:
    runs, waits = RUNS, WAITS
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


def held_up(tiny: Path, tier: DelayedTier, params: SamplingParams) -> EngineCore:
    """Return an engine that runs one sequence at a time, whose tier holds `WAITS`."""
    plain = core_for(tiny).info.bytes_per_token
    core = core_for(
        tiny,
        tenants={"a": 1.0},
        parts=parts(tier=tier),
        pages=8,
        page_bytes=64 * plain,
        max_num_seqs=1,
    )
    drive(core, [request(WAITS, SHORT, id="before")])
    manager_of(core).evict_pages("a", 99)
    assert len(tier.kept) == 4
    core.submit(request(RUNS, params, id="runs"))
    core.submit(request(WAITS, SHORT, id="waits"))
    return core


def fetches(core: EngineCore) -> bool:
    """Tell whether pages for `WAITS` are on their way."""
    (waiting,) = core._requests["waits"].sequences
    return waiting.fetch is not None


def told_by(core: EngineCore) -> dict[str, list[Chunk]]:
    """Drive an engine to its end and return what its requests are told."""
    told: dict[str, list[Chunk]] = {"runs": [], "waits": []}
    for _ in range(1000):
        if core.idle():
            return told
        for output in core.step():
            told[output.request_id].append(output.chunk)
    raise AssertionError("it does not end")


def test_pages_are_fetched_before_there_is_a_place_to_run(tiny: dict[str, Path]) -> None:
    tier = DelayedTier(polls=10)
    core = held_up(tiny["qwen2"], tier, SOME)
    told = [output for _ in range(20) for output in core.step()]
    assert tier.fetched == 4, "while the one before it runs"
    assert {output.request_id for output in told} == {"runs"}
    rest = told_by(core)
    alone = drive(core_for(tiny["qwen2"]), [request(WAITS, SHORT)])["r"]
    assert tokens(rest["waits"]) == tokens(alone)
    assert tier.fetched == 4, "and not again"
    assert rest["waits"][-1].cached_tokens == 256


def test_a_fetch_that_is_early_never_ends_who_ran_before_it(tiny: dict[str, Path]) -> None:
    core = held_up(tiny["qwen2"], DelayedTier(polls=10_000), LONG)
    (running,) = core._requests["runs"].sequences
    told: list[Chunk] = []
    while len(running.tokens) < 257:
        told += [output.chunk for output in core.step()]
    assert fetches(core)
    core._scheduler.restart(running)
    for _ in range(10):
        told += [output.chunk for output in core.step()]
    assert not fetches(core), "its pages made way"
    assert not [chunk for chunk in told if chunk.finish is not None]
    assert len(running.tokens) > 260
