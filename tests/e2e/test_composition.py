"""Every seam carries a real object, alone and together with the others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kvkeep.attention.planner import FlatPlanner
from kvkeep.cache.tiers import ClosedPage, OpenRows
from kvkeep.engine.api import SamplingParams
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.engine import EngineCore
from kvkeep.eviction.policy import KeepAll
from kvkeep.quant.codec import Float
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from tests.engines import GREEDY, core_for, drive, request, tokens
from tests.toys import (
    DelayedTier,
    EightBit,
    MirrorShield,
    PromoteOffered,
    RowPlanner,
    WindowEvictor,
)

LONG = SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)


class ClosedLayers:
    """Counts announced layers per page slot."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[int, int]] = Counter()

    def layer_closed(self, page: ClosedPage, layer: int) -> None:
        self.seen[page.slot, layer] += 1

    def rows_stored(self, rows: OpenRows, layer: int, data: bytes) -> None:
        raise AssertionError("nobody else answers these prompts")


def parts(**changes: object) -> Parts:
    """Return null objects, with some replaced."""
    techniques = {"codec": Float(), "shield": NoShield(), "evictor": KeepAll()}
    techniques.update({k: changes.pop(k) for k in list(changes) if k in techniques})
    rest = {"planner": FlatPlanner(), "policy": ShareNothing(), **changes}
    return Parts(techniques=Techniques(**techniques), **rest)  # type: ignore[arg-type]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 200, length)]


def transcript(core: EngineCore, seeds: range = range(3)) -> list[list[int]]:
    """Return the tokens of a few prompts: cold, then warm, then all in one batch."""
    out = []
    prompts = [prompt_of(100 + 60 * s, s) for s in seeds]
    for _ in ("cold", "warm"):
        for i, prompt in enumerate(prompts):
            out.append(tokens(drive(core, [request(prompt, LONG, id=str(i))])[str(i)]))
    batch = drive(core, [request(p, LONG, id=str(i)) for i, p in enumerate(prompts)])
    return out + [tokens(batch[str(i)]) for i in range(len(prompts))]


@pytest.fixture(scope="module")
def plain(tiny: dict[str, Path]) -> list[list[int]]:
    return transcript(core_for(tiny["qwen2"]))


def test_another_planner_gives_the_same_tokens(
    tiny: dict[str, Path], plain: list[list[int]]
) -> None:
    planner = RowPlanner()
    assert transcript(core_for(tiny["qwen2"], parts=parts(planner=planner))) == plain
    assert planner.forgotten > 0


def test_an_exact_shield_gives_the_same_tokens(
    tiny: dict[str, Path], plain: list[list[int]]
) -> None:
    assert transcript(core_for(tiny["qwen2"], parts=parts(shield=MirrorShield()))) == plain


@pytest.fixture(scope="module")
def coded(tiny: dict[str, Path]) -> list[list[int]]:
    return transcript(core_for(tiny["qwen2"], parts=parts(codec=EightBit()), chunk_tokens=512))


def test_a_codec_is_a_function_of_position_alone(coded: list[list[int]]) -> None:
    third = len(coded) // 3
    assert coded[:third] == coded[third : 2 * third] == coded[2 * third :]


@pytest.mark.parametrize(
    "chunk_tokens", [64, *(pytest.param(size, marks=pytest.mark.slow) for size in (128, 256))]
)
def test_a_codec_does_not_depend_on_chunks(
    tiny: dict[str, Path], coded: list[list[int]], chunk_tokens: int
) -> None:
    chosen = parts(codec=EightBit())
    assert transcript(core_for(tiny["qwen2"], parts=chosen, chunk_tokens=chunk_tokens)) == coded


def test_staged_pages_are_all_given_back(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["qwen2"], parts=parts(codec=EightBit()))
    transcript(core)
    core.set_tenants({})
    assert core.stats().pages_free == core.info.num_pages


def test_an_evictor_masks_and_taints_its_own_view_only(
    tiny: dict[str, Path], plain: list[list[int]]
) -> None:
    evictor = WindowEvictor(window_tokens=64)
    core = core_for(tiny["qwen2"], parts=parts(evictor=evictor))
    first = drive(core, [request(prompt_of(220, 2), LONG, id="x")])["x"]
    assert tokens(first) != plain[2], "dropping two thirds of a context must show"
    assert evictor.observed > 0
    longer = prompt_of(220, 2) + tokens(first) + prompt_of(30, 9)
    again = drive(core, [request(longer, LONG, id="y")])["y"]
    assert again[0].cached_tokens == 220, "nothing computed under a mask is indexed"


def test_a_policy_that_promotes_shares_between_tenants(tiny: dict[str, Path]) -> None:
    policy = PromoteOffered()
    core = core_for(tiny["qwen2"], tenants={"a": 0.4, "b": 0.4}, parts=parts(policy=policy))
    prompt = prompt_of(200)
    cold = drive(core, [request(prompt, id="a")])["a"]
    before = drive(core, [request(prompt, id="b0", tenant="b")])["b0"]
    assert before[0].cached_tokens == 0
    core.end_epoch(1.0)
    saved = core.counters.cache_hits
    after = drive(core, [request(prompt, id="b1", tenant="b", scope="fresh")])["b1"]
    assert after[0].cached_tokens == 0, "nobody is told what others have sent"
    assert core.counters.cache_hits - saved == 192
    assert tokens(cold) == tokens(before) == tokens(after)


def test_every_layer_of_every_closed_page_is_announced_once(tiny: dict[str, Path]) -> None:
    closed = ClosedLayers()
    core = core_for(tiny["qwen2"], parts=parts(listeners=(closed,)))
    closed.seen.clear()
    drive(core, [request(prompt_of(200), GREEDY)])
    pages = {page for page, _ in closed.seen}
    assert len(pages) == 3
    assert set(closed.seen.values()) == {1}
    assert len(closed.seen) == 3 * core.info.num_layers


@pytest.mark.parametrize("fail", [False, True])
def test_a_sequence_waits_for_pages_of_a_lower_tier(tiny: dict[str, Path], fail: bool) -> None:
    tier = DelayedTier(polls=5, fail=fail)
    roomy = core_for(tiny["qwen2"])
    page_bytes = roomy.info.bytes_per_token * 64
    core = core_for(
        tiny["qwen2"], tenants={"a": 1.0}, parts=parts(tier=tier), pages=8, page_bytes=page_bytes
    )
    prompt = prompt_of(256, 1)
    cold = drive(core, [request(prompt, id="cold")])["cold"]
    drive(core, [request(prompt_of(450, 2), id="other")])
    again = drive(core, [request(prompt, id="again")])["again"]
    assert tier.fetched > 0
    assert again[0].cached_tokens == (0 if fail else 256)
    assert tokens(again) == tokens(cold)


def test_what_a_tier_holds_is_fetched_whole_once_there_is_room(tiny: dict[str, Path]) -> None:
    tier = DelayedTier(polls=1)
    page_bytes = core_for(tiny["qwen2"]).info.bytes_per_token * 64
    core = core_for(
        tiny["qwen2"], tenants={"a": 1.0}, parts=parts(tier=tier), pages=8, page_bytes=page_bytes
    )
    prompt = prompt_of(256, 1)
    drive(core, [request(prompt, id="cold")])
    drive(core, [request(prompt_of(450, 2), id="other")])
    told = drive(core, [request(prompt_of(300, 3), id="before"), request(prompt, id="again")])
    assert told["again"][0].cached_tokens == 256, "half of it fetched and half computed"
    assert tier.fetched == 4


def test_all_seams_together(tiny: dict[str, Path]) -> None:
    def build() -> EngineCore:
        both = parts(
            codec=EightBit(),
            shield=MirrorShield(),
            evictor=WindowEvictor(10_000),
            planner=RowPlanner(),
            policy=PromoteOffered(),
        )
        return core_for(tiny["qwen2"], parts=both, tenants={"a": 0.4, "b": 0.4})

    core = build()
    once = transcript(core)
    core.end_epoch(1.0)
    assert transcript(core) == once == transcript(build())
