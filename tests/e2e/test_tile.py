"""`--shield tile` through the whole engine: answers, what lies in memory, changed tiles."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvkeep.cache.sealed import SealedTiles
from kvkeep.disagg.prefill import NothingBelow
from kvkeep.engine.api import Chunk, SamplingParams
from kvkeep.engine.build import build_core, default_parts
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions, KeyOptions
from kvkeep.errors import ConfigError
from kvkeep.types import PAGE_TOKENS, PageState
from tests.engines import core_for, drive, manager_of, request

LONG = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=0)
PREFIX = 256
FORMS: dict[str, dict[str, object]] = {
    "bf16": {},
    "k2v2": {"kv": "k2v2"},
    "auto": {"kv": "auto", "kv_auto_tokens": 300, "kv_auto_codec": "k4v2"},
    "corm": {"evict": "corm", "evict_window": 16, "evict_recent": 8, "evict_weight": 4.0},
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 200, length)]


def told(chunks: list[Chunk]) -> list[tuple[int, bytes]]:
    """Return tokens and the bits of their log-probabilities."""
    return [
        (token, np.float64(score.logprob).tobytes())
        for chunk in chunks
        for token, score in zip(chunk.token_ids, chunk.logprobs or (), strict=True)
    ]


def said(core: EngineCore) -> list[list[tuple[int, bytes]]]:
    """Return answers to prompts cold, warm, and at once behind one prefix."""
    prompt = prompt_of(300)
    out = [told(drive(core, [request(prompt, LONG)])["r"]) for _ in ("cold", "warm")]
    prefix = prompt_of(PREFIX, 1)
    together = [request(prefix + prompt_of(20 + i, i), LONG, id=str(i)) for i in range(4)]
    drive(core, [request(prefix, LONG, id="first")])
    return out + [told(chunks) for chunks in drive(core, together).values()]


def tiles_of(core: EngineCore) -> SealedTiles:
    sealed = manager_of(core).pool._storage  # type: ignore[union-attr]
    assert isinstance(sealed, SealedTiles)
    return sealed


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_those_without_a_shield(form: str, tiny: dict[str, Path]) -> None:
    family = "qwen3" if form == "corm" else "qwen2"
    plain = said(core_for(tiny[family], **FORMS[form]))  # type: ignore[arg-type]
    assert said(core_for(tiny[family], shield="tile", **FORMS[form])) == plain  # type: ignore[arg-type]


def closed_pages(core: EngineCore) -> Iterator[int]:
    """Yield the slots of all full pages that any cache has indexed."""
    for manager in core.caches.managers.values():
        for root in manager.index.roots():
            for page in manager.index.leaves_first(root):
                assert page.n_tokens == PAGE_TOKENS, "rows of open pages are not kept"
                assert page.state is not PageState.OPEN
                yield page.slot


@pytest.mark.parametrize("form", FORMS)
def test_no_page_lies_open_between_requests(form: str, tiny: dict[str, Path]) -> None:
    family = "qwen3" if form == "corm" else "qwen2"
    small: dict[str, object] = {"kv_cache_bytes": 12 << 20, "max_num_seqs": 8, **FORMS[form]}
    core = core_for(tiny[family], shield="tile", **small)  # type: ignore[arg-type]
    said(core)
    pool = manager_of(core).pool
    held, slots = tiles_of(core).buffer.numpy().tobytes(), sorted(set(closed_pages(core)))
    assert len(slots) > PREFIX // PAGE_TOKENS
    for slot in slots:
        for layer in range(pool.spec.num_layers):
            raw = np.frombuffer(pool.read(slot, layer), np.uint8)
            raw = raw[: len(raw) // 64 * 64].reshape(-1, 64)
            busy = raw[[len(set(row)) > 16 for row in raw.tolist()]][:2]
            assert len(busy), "there is something to be seen"
            assert not any(row.tobytes() in held for row in busy)


def test_without_sealing_the_pages_would_be_seen(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["qwen2"], shield="seal")
    drive(core, [request(prompt_of(300), LONG)])
    pool = manager_of(core).pool
    held = pool.buffer.numpy().tobytes()  # type: ignore[union-attr]
    (root,) = manager_of(core).index.roots()
    page = next(iter(root.children.values()))
    assert pool.read(page.slot, 0)[:64] in held
    assert np.array(prompt_of(64), "<i4").tobytes() == page.key


def test_the_index_holds_labels_alone(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["qwen2"], shield="tile")
    drive(core, [request(prompt_of(300), LONG)])
    (root,) = manager_of(core).index.roots()
    pages = manager_of(core).index.leaves_first(root)
    assert len(pages) == 340 // PAGE_TOKENS
    assert {len(page.key) for page in pages} == {32}
    assert not root.partials
    other = core_for(tiny["qwen2"], shield="tile")
    drive(other, [request(prompt_of(300), LONG)])
    (twin,) = manager_of(other).index.roots()
    assert not root.children.keys() & twin.children.keys(), "another start, another key"


@pytest.mark.parametrize("evict", [False, True], ids=["tree", "corm"])
def test_more_than_fits_the_scratch_is_attended_in_slices(
    evict: bool, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, object] = FORMS["corm"] if evict else {}
    family = tiny["qwen3" if evict else "qwen2"]
    plain = said(core_for(family, **options))  # type: ignore[arg-type]
    core = core_for(family, shield="tile", max_model_len=345, **options)  # type: ignore[arg-type]
    calls, model = [], core._runner._opener
    open_plan = model.open

    def counted(plan: object) -> object:
        made = open_plan(plan)  # type: ignore[arg-type]
        calls.append(len(made._slices))  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(model, "open", counted)
    assert said(core) == plain
    assert max(calls) > 1, "several requests' pages are more than one request's"


def flip(core: EngineCore, at: int = 0) -> None:
    """Change a bit of a tile of the page at place `at` of the only chain there is."""
    tiles, pool = tiles_of(core), manager_of(core).pool
    (root,) = manager_of(core).index.roots()
    page = root
    for _ in range(at + 1):
        page = next(iter(page.children.values()))
    tile = int(pool.tile_table[page.slot, 0, 0])
    unit = pool.layer_kv(0).unit_bytes  # type: ignore[union-attr]
    tiles.buffer.numpy()[tile * unit + 5] ^= 4


@pytest.mark.parametrize("form", ["bf16", "k2v2"])
def test_a_changed_tile_costs_time_and_no_token(form: str, tiny: dict[str, Path]) -> None:
    options = FORMS[form]
    plain = core_for(tiny["qwen2"], **options)  # type: ignore[arg-type]
    core = core_for(tiny["qwen2"], shield="tile", **options)  # type: ignore[arg-type]
    prompt = prompt_of(400)
    wanted = told(drive(plain, [request(prompt, LONG)])["r"])
    assert told(drive(core, [request(prompt, LONG)])["r"]) == wanted
    flip(core, 1)
    assert told(drive(core, [request(prompt, LONG, id="s")])["s"]) == wanted
    lost = manager_of(core).losses.lost_pages
    assert lost >= 2, "the page and what continues it"
    assert told(drive(core, [request(prompt, LONG, id="t")])["t"]) == wanted
    assert manager_of(core).losses.lost_pages == lost


def test_a_tile_that_changes_while_others_run_concerns_its_own_request(
    tiny: dict[str, Path],
) -> None:
    prompts = {"x": prompt_of(300, 5), "y": prompt_of(300, 6)}
    many = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=0, n=2)
    asked = [request(p, many, id=name) for name, p in prompts.items()]
    plain = drive(core_for(tiny["qwen2"]), asked)
    core = core_for(tiny["qwen2"], shield="tile")

    def change(step: int) -> None:
        if step == 14:
            tiles, pool = tiles_of(core), manager_of(core).pool
            for root in manager_of(core).index.roots():
                page = next(iter(root.children.values()))
                tile = int(pool.tile_table[page.slot, 1, 0])
                unit = pool.layer_kv(0).unit_bytes  # type: ignore[union-attr]
                tiles.buffer.numpy()[tile * unit] ^= 1

    found = drive(core, asked, change)
    for name in prompts:
        for index in range(2):
            own = [c for c in found[name] if c.index == index]
            assert told(own) == told([c for c in plain[name] if c.index == index])
    assert manager_of(core).losses.lost_pages


def test_preempted_cancelled_and_forked_requests_leave_nothing_open(tiny: dict[str, Path]) -> None:
    wide = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logprobs=0, n=3)
    asked = [request(prompt_of(150, i), wide, id=str(i)) for i in range(4)]
    page_bytes = manager_of(core_for(tiny["qwen2"])).pool.spec.page_bytes
    plain = drive(core_for(tiny["qwen2"], pages=40, page_bytes=page_bytes), asked)
    scratch = tiles_of(core_for(tiny["qwen2"], shield="tile", max_model_len=400)).scratch_bytes
    core = core_for(
        tiny["qwen2"], shield="tile", max_model_len=400, kv_cache_bytes=24 * page_bytes + scratch
    )

    def cancel(step: int) -> None:
        if step == 20:
            core.cancel("3")

    found = drive(core, asked, cancel)
    for name in "012":
        for index in range(3):
            own = [told([c for c in said[name] if c.index == index]) for said in (found, plain)]
            assert own[0] == own[1]
    assert core._scheduler.preemptions
    tiles, pool = tiles_of(core), manager_of(core).pool
    busy = {int(tile) for slot in closed_pages(core) for tile in pool.tile_table[slot].ravel()}
    for at, own_range in enumerate(tiles._ranges):
        numbers = np.flatnonzero(tiles._tiles[at].any(1))
        plain_ones = numbers[tiles._counts[at][numbers] == 0]
        assert not busy & set(own_range.ids(plain_ones.astype(np.int32)).tolist())
        assert not len(plain_ones), "what nobody holds any more is zero"
    assert not tiles._scratch.any()


@pytest.mark.parametrize("kv", ["bf16", "k2v2"])
def test_pages_go_below_memory_and_come_back(
    kv: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    prompts = [prompt_of(300 + 40 * seed, seed) for seed in range(4)]
    small: dict[str, object] = {"tenants": {"a": 0.9}, "kv": kv, "max_model_len": 700}
    room = 1 << 20 if kv == "bf16" else 3 << 20
    plain = core_for(tiny["qwen2"], max_num_seqs=4, kv_cache_bytes=room, **small)  # type: ignore[arg-type]
    wanted = [told(drive(plain, [request(p, LONG)])["r"]) for p in prompts]
    core = core_for(
        tiny["qwen2"],
        shield="tile",
        tiers=("memory:64MiB",),
        keys=KeyOptions(store=str(tmp_path / "keys.json")),
        max_num_seqs=4,
        kv_cache_bytes=room,
        **small,  # type: ignore[arg-type]
    )
    for _ in ("cold", "warm"):
        assert [told(drive(core, [request(p, LONG)])["r"]) for p in prompts] == wanted
    core.caches.managers[next(iter(core.caches.managers))].evict_pages("a", 10_000)
    end = time.monotonic() + 30
    while any(m.below is not None and m.below.copying for m in core.caches.managers.values()):
        core.caches.poll()
        assert time.monotonic() < end
    again = [drive(core, [request(p, LONG)])["r"] for p in prompts]
    assert [told(chunks) for chunks in again] == wanted
    assert sum(use.hits for use in core.stats().tiers) > 0
    core.close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernel": "triton"}, "on a CPU"),
        ({"kv": "k2v2", "guard_share": 0.5}, "guard_share: shadows would lie open"),
    ],
    ids=["device", "guard"],
)
def test_what_would_leave_pages_open_is_refused(
    options: dict[str, object], sentence: str, tiny: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        core_for(tiny["qwen2"], shield="tile", **options)  # type: ignore[arg-type]


def test_a_clusters_worker_is_refused(tiny: dict[str, Path]) -> None:
    options = EngineOptions(model=str(tiny["qwen2"]), shield="tile", threads=1)
    parts = default_parts(options)
    parts.tier = NothingBelow()
    with pytest.raises(ConfigError, match="use seal in a cluster"):
        build_core(options, parts=parts)
