"""Eviction by masks in the engine: what is kept follows from a request's own tokens alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvkeep.attention.planner import FlatPlanner
from kvkeep.engine.api import Chunk, GenerateRequest, SamplingParams, TenantTerms
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.engine import EngineCore
from kvkeep.eviction.corm import Corm, CormOptions
from kvkeep.quant.codec import Codec, Float
from kvkeep.shield.policy import NoShield
from kvkeep.types import UInt64Array
from kvkeep.watch import EvictState, Watch
from tests.engines import core_for, drive, request
from tests.toys import EightBit

SMALL = CormOptions(window=24, recent=16, weight=4.0, sinks=2, birth="seen", decide_every=4)
ASKED = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=0)
Said = list[tuple[int, float]]


class Recording(Corm):
    """Remembers all masks it has given, by prompt length and position."""

    def __init__(self, options: CormOptions = SMALL) -> None:
        super().__init__(options)
        self.given: dict[tuple[int, int], UInt64Array] = {}

    def keep(self, state: EvictState, position: int) -> UInt64Array:
        masks = super().keep(state, position)
        if state.watch.decides(position):
            known = self.given.setdefault((state.watch.prompt_tokens, position), masks)
            assert np.array_equal(known, masks), "the same rows keep the same tokens"
        return masks

    @property
    def kept(self) -> float:
        """Return the least part of a view's tokens that was kept."""
        return min(_live(masks, position) for (_, position), masks in self.given.items())


class MaskOnly(Corm):
    """Evicts the same tokens, and none of its views is packed."""

    def watch(self, prompt_tokens: int) -> Watch:
        return dataclasses.replace(super().watch(prompt_tokens), recent=None)


def _live(masks: UInt64Array, position: int) -> float:
    if not masks.size:
        return 1.0
    ends = masks.shape[0] * 64 - position - 1
    heads = masks.shape[1] * masks.shape[2]
    return float(np.bitwise_count(masks).sum() / heads - ends) / (position + 1)


def evicting(
    model: Path, evictor: Corm, codec: Codec | None = None, **options: object
) -> EngineCore:
    chosen = Parts(techniques=Techniques(codec or Float(), NoShield(), evictor))
    return core_for(model, parts=chosen, **options)  # type: ignore[arg-type]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 200, length)]


PROMPTS = [prompt_of(20, 1), prompt_of(150, 2), prompt_of(331, 3), prompt_of(128, 4)]


def said(chunks: list[Chunk], index: int = 0) -> Said:
    """Return the tokens of one sequence and the bits of their log-probabilities."""
    return [(t.token_id, t.logprob) for c in chunks if c.index == index for t in c.logprobs]


def asked(**changes: object) -> list[GenerateRequest]:
    return [
        msgspec.structs.replace(request(p, ASKED, id=str(i)), **changes)
        for i, p in enumerate(PROMPTS)
    ]


def answers(core: EngineCore, requests: list[GenerateRequest]) -> dict[str, Said]:
    return {name: said(chunks) for name, chunks in drive(core, requests).items()}


def one_by_one(core: EngineCore, requests: list[GenerateRequest]) -> dict[str, Said]:
    return {r.id: said(drive(core, [r])[r.id]) for r in requests}


@pytest.fixture(scope="module")
def recorder() -> Recording:
    """One for all engines, so that it compares the masks of all of them."""
    return Recording()


@pytest.fixture(scope="module")
def cold(tiny: dict[str, Path], recorder: Recording) -> dict[str, Said]:
    return one_by_one(evicting(tiny["qwen2"], recorder), asked())


@pytest.fixture(scope="module")
def whole(tiny: dict[str, Path]) -> dict[str, Said]:
    return one_by_one(core_for(tiny["qwen2"]), asked())


def test_evicting_shows(cold: dict[str, Said], whole: dict[str, Said], recorder: Recording) -> None:
    assert 0.1 < recorder.kept < 0.7
    assert cold["0"][:20] == whole["0"][:20], "nothing of a short prompt goes before w answers"
    assert all(cold[name][0] == whole[name][0] for name in cold), "prompts see all of themselves"
    assert all(cold[name] != whole[name] for name in "123")


@pytest.mark.parametrize("chunk_tokens", [16, 512])
def test_chunks_and_batches_change_no_bit(
    tiny: dict[str, Path], recorder: Recording, cold: dict[str, Said], chunk_tokens: int
) -> None:
    core = evicting(tiny["qwen2"], recorder, chunk_tokens=chunk_tokens)
    assert answers(core, asked()) == cold
    assert answers(core, asked()) == cold, "warm"


def test_warm_prompts_compute_what_is_observed(
    tiny: dict[str, Path], recorder: Recording, cold: dict[str, Said]
) -> None:
    core = evicting(tiny["qwen2"], recorder)
    for name in ("first", "again"):
        got = {r.id: drive(core, [r])[r.id] for r in asked()}
        assert {i: said(chunks) for i, chunks in got.items()} == cold
        if name == "again":
            hits = [got[str(i)][0].cached_tokens for i in range(4)]
            assert hits == [20, 126, 307, 104], "all but w rows; a short prompt whole"
    core.set_tenants({})
    assert core.stats().pages_free == core.info.num_pages


def test_preempted_sequences_come_back_to_the_same_bits(
    tiny: dict[str, Path], recorder: Recording, cold: dict[str, Said]
) -> None:
    roomy = evicting(tiny["qwen2"], recorder)
    page_bytes = roomy.info.bytes_per_token * 64
    core = evicting(tiny["qwen2"], recorder, tenants={"a": 1.0}, pages=9, page_bytes=page_bytes)
    assert answers(core, asked()) == cold
    assert core.stats().preemptions_total > 0


def test_forks_take_what_was_kept_with_them(tiny: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=30, n=3, seed=5, ignore_eos=True, logprobs=0)
    roomy = evicting(tiny["qwen2"], Corm(SMALL))
    want = drive(roomy, [request(PROMPTS[1], params)])["r"]
    page_bytes = roomy.info.bytes_per_token * 64
    tight = evicting(tiny["qwen2"], Corm(SMALL), tenants={"a": 1.0}, pages=5, page_bytes=page_bytes)
    got = drive(tight, [request(PROMPTS[1], params)])["r"]
    assert [said(got, i) for i in range(3)] == [said(want, i) for i in range(3)]
    assert len({tuple(said(want, i)) for i in range(3)}) == 3
    tight.set_tenants({})
    assert tight.stats().pages_free == tight.info.num_pages


@pytest.mark.parametrize("who", ["request", "tenant"])
def test_evicting_one_leaves_another_on_the_same_pages_alone(
    tiny: dict[str, Path],
    recorder: Recording,
    cold: dict[str, Said],
    whole: dict[str, Said],
    who: str,
) -> None:
    core = evicting(tiny["qwen2"], recorder)
    core.set_tenants({"a": 0.5, "b": 0.5}, {"b": TenantTerms(voter="b", evict=False)})
    spared = {"evict": False} if who == "request" else {"tenant": "b"}
    mine = asked(scope="same")
    others = [msgspec.structs.replace(r, id=f"x{r.id}") for r in asked(scope="same", **spared)]
    got = answers(core, [r for pair in zip(mine, others, strict=True) for r in pair])
    assert {i: got[i] for i in "0123"} == cold
    assert {i: got[f"x{i}"] for i in "0123"} == whole


def test_nothing_computed_under_masks_is_indexed(
    tiny: dict[str, Path], recorder: Recording, whole: dict[str, Said]
) -> None:
    core = evicting(tiny["qwen2"], recorder)
    tokens = [t for t, _ in answers(core, asked())["2"]]
    longer = PROMPTS[2] + tokens + prompt_of(30, 9)
    spared = msgspec.structs.replace(request(longer, ASKED, id="y"), evict=False)
    assert drive(core, [spared])["y"][0].cached_tokens == 320


def test_protected_tokens_stay(tiny: dict[str, Path]) -> None:
    recorder = Recording()
    core = evicting(tiny["qwen2"], recorder)
    answers(core, [msgspec.structs.replace(asked()[2], protected=((0, 70),))])
    masks = recorder.given[331, 330]
    assert (masks[0] == np.iinfo(np.uint64).max).all()
    assert (masks[1] & np.uint64(63) == 63).all()
    assert (masks[2] != np.iinfo(np.uint64).max).any()


@pytest.mark.parametrize("planner", [None, FlatPlanner()])
def test_random_runs_return_every_page(tiny: dict[str, Path], planner: FlatPlanner | None) -> None:
    rng = np.random.default_rng(7)
    parts = Parts(techniques=Techniques(Float(), NoShield(), Corm(SMALL)), planner=planner)
    spec = core_for(tiny["qwen2"]).info.bytes_per_token * 64
    core = core_for(tiny["qwen2"], parts=parts, pages=24, page_bytes=spec)
    names: list[str] = []

    def meddle(step: int) -> None:
        if step % 5 == 0 and len(names) < 20:
            names.append(f"m{len(names)}")
            params = SamplingParams(max_tokens=int(rng.integers(1, 40)), n=int(rng.integers(1, 4)))
            tenant = "ab"[int(rng.integers(2))]
            core.submit(request(PROMPTS[step % 4], params, id=names[-1], tenant=tenant))
        if step % 7 == 0:
            core.cancel(names[int(rng.integers(len(names)))])

    drive(core, asked(), meddle)
    core.set_tenants({})
    assert core.stats().pages_free == core.info.num_pages


def test_coded_pages_under_masks(tiny: dict[str, Path]) -> None:
    recorder = Recording()
    want = one_by_one(evicting(tiny["qwen2"], recorder, EightBit()), asked())
    core = evicting(tiny["qwen2"], recorder, EightBit(), chunk_tokens=32)
    assert answers(core, asked()) == want == one_by_one(core, asked())
    assert recorder.kept < 0.7


def test_packed_views_attend_to_the_same_tokens(tiny: dict[str, Path]) -> None:
    """Packing changes the order of sums and nothing else; and memory comes back."""
    params = msgspec.structs.replace(ASKED, max_tokens=140)
    prompt = request(PROMPTS[2], params)
    packed = evicting(tiny["qwen2"], Corm(SMALL))
    masked = evicting(tiny["qwen2"], MaskOnly(SMALL))
    got = [said(drive(core, [prompt])["r"]) for core in (packed, masked)]
    ours, theirs = (np.array([p for _, p in one]) for one in got)
    assert [t for t, _ in got[0]] == [t for t, _ in got[1]]
    assert np.abs(ours - theirs).max() < 1e-4
    stats, other = packed.stats().evict, masked.stats().evict
    assert stats.packed_views_total == 2
    assert stats.freed_bytes_total > packed.info.bytes_per_token * 64
    assert (other.packed_views_total, other.freed_bytes_total) == (0, 0)
    assert stats.prompt_tokens_total == 331 == other.prompt_tokens_total
    assert 0.1 < stats.prompt_kept_tokens_total / 331 < 0.9
    assert stats.seen_tokens_total == sum(range(1, 331 + 140))
    assert stats.live_tokens_total == pytest.approx(other.live_tokens_total, rel=1e-3)
    assert 0.1 < stats.live_tokens_total / stats.seen_tokens_total < 0.95
