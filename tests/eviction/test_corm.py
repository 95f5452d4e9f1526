"""CORM against the published algorithm, and the promises of its edges."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from kvkeep.errors import ConfigError
from kvkeep.eviction.calibration import HeadRule
from kvkeep.eviction.corm import (
    FOREVER,
    PRESETS,
    Birth,
    Corm,
    CormOptions,
    pack,
    spread_over,
    unpack,
)
from kvkeep.eviction.policy import Look
from kvkeep.types import PAGE_TOKENS, Layout, PageSpec
from kvkeep.watch import EvictState
from tests.eviction.literal import LiteralHead, Scores

LAYERS, HEADS, GROUP = 2, 2, 2
SPEC = PageSpec(Layout.F32, LAYERS, HEADS, 16, 64 * 16 * 8)
SMALL = CormOptions(window=16, recent=8, sinks=2)


def state_of(corm: Corm, prompt: int) -> EvictState:
    return corm.new_state(SPEC, corm.watch(prompt))


def live_of(state: EvictState, tokens: int) -> list[list[NDArray[np.int64]]]:
    """Return the live positions of each layer and head."""
    pages = -(-tokens // PAGE_TOKENS)
    live = unpack(state.masks, (LAYERS, pages, HEADS, PAGE_TOKENS))
    live = np.moveaxis(live, 2, 1).reshape(LAYERS, HEADS, -1)[..., :tokens]
    return [[np.flatnonzero(head) for head in layer] for layer in live]


def stamps_of(hits: dict[int, list[int]], tokens: int, head: int = 0) -> NDArray[np.int32]:
    """Return stamps [P, Hkv, S] from {row: the positions it hit}."""
    flat = np.full((HEADS, -(-tokens // PAGE_TOKENS) * PAGE_TOKENS), -1, np.int32)
    for row, at in hits.items():
        flat[head, at] = np.maximum(flat[head, at], row)
    return np.ascontiguousarray(flat.reshape(HEADS, -1, PAGE_TOKENS).transpose(1, 0, 2))


@pytest.mark.parametrize("birth", ["unseen", "seen"])
@pytest.mark.parametrize(("prompt", "chunk"), [(1, 1), (100, 100), (100, 7), (9, 9)])
@pytest.mark.parametrize(("weight", "most"), [(1.0, 1.0), (4.0, 1.0), (4.0, 0.025)])
def test_the_literal_algorithm_bit_for_bit(
    birth: Birth, prompt: int, chunk: int, weight: float, most: float
) -> None:
    """Message matrix and probabilities there, stamps and log-sum-exp here; and chunks of rows."""
    tokens, options = 220, dataclasses.replace(SMALL, weight=weight, most=most, birth=birth)
    corm = Corm(options)
    worlds = [Scores(tokens, HEADS, GROUP, seed) for seed in range(LAYERS)]
    literal = [
        [LiteralHead(16, 8, sinks=2, birth_counts=birth == "seen") for _ in range(HEADS)]
        for _ in range(LAYERS)
    ]
    state = state_of(corm, prompt)
    found = [np.full((4, HEADS, PAGE_TOKENS), -1, np.int32) for _ in range(LAYERS)]
    for row in range(tokens):
        for layer, world in enumerate(worlds):
            for head in range(HEADS):
                own = literal[layer][head]
                own.born(row)
                if row < state.watch.first:
                    continue
                asked = min(weight / (row + 1), most)
                important = world.probabilities(row, head, own.kept) >= asked
                excess = world.excess2(row, head, own.kept)
                hit = (excess >= corm.thresholds(state, row)).any(0)
                assert np.array_equal(hit, important.any(0)), "both tests mark the same tokens"
                at = own.kept[hit]
                found[layer][at // PAGE_TOKENS, head, at % PAGE_TOKENS] = row
                own.step(np.asarray(important.any(0)), evicts=row >= prompt - 1)
        ends = row + 1 >= prompt or (row + 1) % chunk == 0
        if not ends:
            continue
        for layer in range(LAYERS):
            corm.observe(state, layer, found[layer][: row // PAGE_TOKENS + 1])
            found[layer][:] = -1
        state.masks = corm.keep(state, row)
        if row >= prompt - 1:
            for layer, heads in enumerate(live_of(state, row + 1)):
                for head, live in enumerate(heads):
                    assert np.array_equal(live, literal[layer][head].kept)
    lengths = {len(head) for layer in live_of(state, tokens) for head in layer}
    assert max(lengths) < tokens, "something must go"
    assert len(lengths) > 1, "heads differ in length"


def test_a_token_goes_at_step_w_and_one_head_of_its_group_keeps_it() -> None:
    corm, token = Corm(SMALL), 20
    for rescued in (None, 40):
        state = state_of(corm, 30)
        for row in range(14, 60):
            hits = {row: [token]} if row in (29, rescued) else {row: [0]}
            for layer in range(LAYERS):
                corm.observe(state, layer, stamps_of(hits, row + 1))
            state.masks = corm.keep(state, row)
            if row < 29:
                continue
            last = 29 if rescued is None or row < rescued else rescued
            assert (token in live_of(state, row + 1)[0][0]) == (row - last < 16)
            assert token not in live_of(state, row + 1)[0][1], "heads decide alone"


def test_nothing_goes_before_w_rows_were_observed_nor_the_last_r_nor_the_first() -> None:
    corm = Corm(SMALL)
    state = state_of(corm, 5)
    for row in range(20):
        state.masks = corm.keep(state, row)
        assert not state.masks.size, "a prompt shorter than w is not observed"
    state.masks = corm.keep(state, 20)
    assert live_of(state, 21)[0][0].tolist() == [0, 1, *range(13, 21)]


def test_protected_spans_stay() -> None:
    corm = Corm(SMALL)
    state = corm.new_state(SPEC, corm.watch(100), ((10, 13), (70, 72)))
    state.masks = corm.keep(state, 99)
    assert live_of(state, 100)[1][1].tolist() == [0, 1, 10, 11, 12, 70, 71, *range(92, 100)]


def test_the_prompts_last_w_rows_are_observed_and_every_mth_later() -> None:
    corm = Corm(dataclasses.replace(SMALL, observe_every=4))
    state = state_of(corm, 100)
    observed = [p for p in range(120) if corm.thresholds(state, p) < math.inf]
    assert observed == [*range(84, 100), 103, 107, 111, 115, 119]
    exact = math.log2(1 / 104)
    assert exact - 1e-4 < corm.thresholds(state, 103) < exact, "equal weights are all important"


def test_decisions_fall_at_multiples_and_rows_are_cut_there() -> None:
    corm = Corm(dataclasses.replace(SMALL, decide_every=16))
    watch = corm.watch(100)
    assert watch.first == 84
    assert [p for p in range(200) if watch.decides(p)] == [99, 111, 127, 143, 159, 175, 191]
    assert [watch.edge(p) for p in (0, 99, 100, 111, 112)] == [100, 100, 112, 112, 128]
    state = state_of(corm, 100)
    state.masks = before = corm.keep(state, 99)
    assert corm.keep(state, 105) is before
    assert corm.keep(state, 111) is not before


def test_a_cap_drops_the_longest_unseen_first_and_a_floor_holds() -> None:
    corm = Corm(dataclasses.replace(SMALL, cap=14))
    state = state_of(corm, 100)
    hits = {99: [30, 31], 98: [40], 90: [50, 51, 52]}
    corm.observe(state, 0, stamps_of(hits, 100, head=0))
    state.masks = corm.keep(state, 99)
    kept = live_of(state, 100)
    assert kept[0][0].tolist() == [0, 1, 30, 31, 40, 52, *range(92, 100)]
    assert len(kept[0][1]) == 10
    floored = Corm(CormOptions(window=16, recent=1, sinks=0, cap=64))
    state = state_of(floored, 100)
    floored.observe(state, 0, stamps_of({95: list(range(59))}, 100, head=0))
    floored.observe(state, 0, stamps_of({3: [7, 8, 9]}, 100, head=1))
    state.masks = floored.keep(state, 99)
    kept = live_of(state, 100)
    assert len(kept[0][0]) == 60
    assert kept[0][1].tolist() == [7, 8, 9, 96, 97, 98, 99]


def test_no_more_than_half_of_a_row_is_asked_of_a_token() -> None:
    """Where a prompt is shorter than c, c / t is more than any weight."""
    corm = Corm(PRESETS["corm"])
    c = PRESETS["corm"].weight
    state = state_of(corm, 100)
    assert corm.thresholds(state, 99) == pytest.approx(-1.0, abs=1e-4)
    assert corm.thresholds(state, int(2 * c) - 1) == pytest.approx(-1.0, abs=1e-4)
    assert corm.thresholds(state, int(4 * c) - 1) == pytest.approx(-2.0, abs=1e-4)
    published = Corm(dataclasses.replace(SMALL, weight=4.0))
    state = state_of(published, 1)
    assert published.thresholds(state, 1) == pytest.approx(0.0, abs=1e-4), "no weight is more"
    assert published.thresholds(state, 4) == pytest.approx(math.log2(4 / 5), abs=1e-4)


def test_tokens_after_an_important_one_stay_with_it() -> None:
    corm = Corm(dataclasses.replace(SMALL, spread=3))
    state = state_of(corm, 100)
    corm.observe(state, 0, stamps_of({99: [40], 90: [42, 62]}, 100))
    state.masks = corm.keep(state, 99)
    kept = live_of(state, 100)
    assert kept[0][0].tolist() == [0, 1, *range(40, 46), *range(62, 66), *range(92, 100)]
    assert kept[0][1].tolist() == [0, 1, *range(92, 100)]
    assert state.last_hit[0, 0, 0, 43:46].tolist() == [99, 90, 90], "the later row counts"
    stamps = stamps_of({5: [1]}, 3)
    assert spread_over(stamps, 64)[0, 0, 1:].tolist() == [5] * 63


@pytest.mark.parametrize("spread", [0, 1, 12, 63, 64])
def test_bits_of_one_row_say_what_its_stamps_do(spread: int) -> None:
    corm, draw = Corm(dataclasses.replace(SMALL, spread=spread)), np.random.default_rng(spread)
    for share in (0.02, 0.3, 1.0):
        states = [corm.new_state(SPEC, corm.watch(100), ((10, 13),)) for _ in range(2)]
        seen = draw.random((5, HEADS, PAGE_TOKENS)) < share
        hits = np.packbits(seen, -1, bitorder="little").view(np.uint64)[..., 0]
        earlier = draw.integers(-1, 90, seen.shape, np.int32)
        for state in states:
            corm.observe(state, 1, earlier)
        corm.observe(states[0], 1, np.where(seen, np.int32(319), np.int32(-1)))
        corm.observe(states[1], 1, Look(319, hits))
        assert np.array_equal(states[0].last_hit, states[1].last_hit)
        assert (states[1].last_hit == 319).any()
        assert (states[1].last_hit[:, 0, :, 10:13] == FOREVER).all()


def test_few_rows_decide_on_the_prompt_and_a_longer_window_on_the_answer() -> None:
    corm = Corm(dataclasses.replace(SMALL, window=40, prompt_rows=4, birth="seen", recent=1))
    watch = corm.watch(100)
    assert (watch.first, watch.recent) == (96, 4)
    state = state_of(corm, 100)
    corm.observe(state, 0, stamps_of({99: [30]}, 100))
    state.masks = corm.keep(state, 99)
    assert live_of(state, 100)[0][0].tolist() == [0, 1, 30, 96, 97, 98, 99]
    assert live_of(state, 100)[0][1].tolist() == [0, 1, 96, 97, 98, 99]
    state.masks = corm.keep(state, 138)
    assert live_of(state, 139)[0][0].tolist() == [0, 1, 30, *range(99, 139)]
    state.masks = corm.keep(state, 139)
    assert live_of(state, 140)[0][0].tolist() == [0, 1, *range(100, 140)]


def test_heads_have_windows_and_weights_of_their_own() -> None:
    rules = [[HeadRule(window=16, weight=1.0), HeadRule(window=32, weight=4.0)]] * LAYERS
    corm = Corm(SMALL, rules)
    assert corm.watch(100).first == 68, "the longest window is observed"
    state = state_of(corm, 100)
    found = corm.thresholds(state, 99)
    assert np.allclose(found, np.log2([[0.01, 0.04]] * LAYERS), atol=1e-4)
    for head in range(HEADS):
        corm.observe(state, 1, stamps_of({99: [30], 80: [40]}, 100, head))
    state.masks = corm.keep(state, 99)
    kept = live_of(state, 100)
    assert kept[1][0].tolist() == [0, 1, 30, *range(92, 100)]
    assert kept[1][1].tolist() == [0, 1, 30, 40, *range(92, 100)]


def test_what_went_stays_away_and_copies_are_apart() -> None:
    corm = Corm(SMALL)
    state = state_of(corm, 100)
    state.masks = corm.keep(state, 99)
    twin = state.copy()
    corm.observe(state, 0, stamps_of({100: [50]}, 101))
    state.masks = corm.keep(state, 100)
    assert 50 not in live_of(state, 101)[0][0]
    assert state.last_hit[0, 0, 0, 50] == 100
    assert twin.last_hit[0, 0, 0, 50] < 0
    assert live_of(twin, 100)[0][0].tolist() == [0, 1, *range(92, 100)]


def test_masks_round_trip() -> None:
    live = np.random.default_rng(0).random((3, 5, 2, PAGE_TOKENS)) < 0.4
    masks = pack(live)
    assert masks.shape == (5, 3, 2)
    assert np.array_equal(unpack(masks, live.shape), live)
    assert bool(int(masks[4, 1, 0]) >> 63) == live[1, 4, 0, 63]


def test_presets() -> None:
    paper = PRESETS["corm-paper"]
    assert (paper.window, paper.recent, paper.weight, paper.birth) == (256, 256, 1.0, "unseen")
    assert paper.decide_every == 1
    assert PRESETS["corm"].weight > 1


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"window": 0}, "evict_window is 0; give a number from 1"),
        ({"recent": 0}, "evict_recent"),
        ({"recent": 1 << 21}, "evict_recent"),
        ({"sinks": -1}, "evict_sinks"),
        ({"weight": 0.0}, "evict_weight is 0.0; give a number above 0"),
        ({"weight": math.nan}, "evict_weight"),
        ({"most": 0.0}, "evict_most is 0.0; give a number above 0, 1 at most"),
        ({"most": 1.5}, "evict_most"),
        ({"most": math.nan}, "evict_most"),
        ({"prompt_rows": 0}, "evict_prompt_rows is 0; give a number from 1 to evict_window, 256"),
        ({"prompt_rows": 257}, "evict_prompt_rows"),
        ({"spread": -1}, "evict_spread is -1; give a number from 0 to 64"),
        ({"spread": 65}, "evict_spread"),
        ({"observe_every": 0}, "evict_observe_every"),
        ({"observe_every": 300}, "lower it or raise evict_window"),
        ({"cap": 259}, "raise it to 260 or more"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(change: dict[str, float], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        CormOptions(**change)  # type: ignore[arg-type]


def test_no_head_may_look_at_fewer_queries_than_one_in_so_many() -> None:
    rules = [[HeadRule(window=32, weight=1.0), HeadRule(window=256, weight=4.0)]] * LAYERS
    with pytest.raises(ConfigError, match="a head looks at 32 queries; lower it"):
        Corm(dataclasses.replace(PRESETS["corm"], observe_every=64), rules)
