"""Coded pages: what a row sees follows from its position, whatever was cached or runs beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.attention.planner import AttentionPlanner, FlatPlanner
from kvkeep.engine.api import Chunk, FinishReason, SamplingParams
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.rows import NewRows, RowStore
from kvkeep.engine.sizing import held_bytes
from kvkeep.errors import ConfigError, EngineError, NonFiniteKV
from kvkeep.eviction.policy import KeepAll
from kvkeep.models.leaf import Embedding
from kvkeep.quant.by_head import ByHead
from kvkeep.quant.codec import Codec, Float, KVShape, Place, Tiles
from kvkeep.quant.hack import Hack
from kvkeep.sharing.policy import ShareAll, ShareNothing, SharingPolicy
from kvkeep.shield.policy import NoShield
from kvkeep.types import PAGE_TOKENS, Layout, PageKind
from tests.calibrated import LAYOUTS
from tests.engines import core_for, drive, manager_of, request
from tests.forests import eager
from tests.toys import EightBit

PARAMS = SamplingParams(max_tokens=6, temperature=0.8, seed=7, logprobs=2, ignore_eos=True)
LENGTH = 300
CODECS: dict[str, Callable[[], Codec]] = {
    "toy": EightBit,
    "k2v2": lambda: Hack(Layout.K2V2),
    "k4v2": lambda: Hack(Layout.K4V2),
    "k8v8": lambda: Hack(Layout.K8V8),
    "by-head": lambda: ByHead(LAYOUTS),
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 200, length)]


def coded_core(
    model: Path,
    codec: Codec,
    *,
    planner: AttentionPlanner | None = None,
    policy: SharingPolicy | None = None,
    **options: object,
) -> EngineCore:
    parts = Parts(
        techniques=Techniques(codec, NoShield(), KeepAll()),
        planner=planner or FlatPlanner(),
        policy=policy or ShareNothing(),
    )
    settings = {"chunk_tokens": 64, "max_num_seqs": 16, **options}
    return core_for(model, parts=parts, **settings)  # type: ignore[arg-type]


def bits(chunks: Iterable[Chunk], index: int = 0) -> list[object]:
    return [(c.text, c.token_ids, c.logprobs, c.finish) for c in chunks if c.index == index]


@pytest.fixture(
    params=[
        "toy",
        "k2v2",
        "by-head",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("k4v2", "k8v8")),
    ]
)
def codec(request: pytest.FixtureRequest) -> Codec:
    return CODECS[request.param]()


class Watched:
    """A codec that counts what it encodes and refuses to decode."""

    def __init__(self, inner: Codec) -> None:
        self._inner = inner
        self.name = inner.name
        self.page_spec, self.folds, self.rotation = inner.page_spec, inner.folds, inner.rotation
        self.pages = 0
        self.first = 0
        self.seen: Counter[bytes] = Counter()

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        self.pages += 1
        self.first += place.first
        self.seen[torch.cat([k, v]).float().numpy().tobytes()] += 1
        return self._inner.encode(k, v, place)

    def decode(
        self, tiles: Tiles, shape: KVShape, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("attention reads codes as they are")


@pytest.mark.parametrize("chunk_tokens", [64, 100, 256])
def test_pages_are_coded_from_a_steps_rows_as_from_what_it_stored(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    asked = [request(prompt_of(length, length), PARAMS, id=f"{length}") for length in (300, 201)]
    new: list[int] = []
    encode_new = RowStore.encode_new

    def counted(store: RowStore, rows: NewRows, at: int, target: int, place: Place) -> None:
        new.append(at)
        encode_new(store, rows, at, target, place)

    def coded() -> Counter[bytes]:
        codec = Watched(Hack(Layout.K2V2))
        drive(coded_core(tiny["qwen2"], codec, chunk_tokens=chunk_tokens), asked)
        return codec.seen

    monkeypatch.setattr(RowStore, "encode_new", counted)
    from_rows = coded()
    assert new, "a page that one step computes is not read back"
    monkeypatch.setattr(RowStore, "stores", lambda *_: False)
    found = len(new)
    assert coded() == from_rows
    assert len(new) == found


def warm_runs(core: EngineCore) -> tuple[list[object], list[int]]:
    """Return what the prompt says after each number of its pages was sent, and what was found."""
    prompt = prompt_of(LENGTH)
    said: list[object] = []
    found: list[int] = []
    for pages in range(LENGTH // PAGE_TOKENS + 1):
        scope = f"s{pages}"
        if pages:
            before = SamplingParams(max_tokens=1, temperature=0.0)
            drive(core, [request(prompt[: pages * PAGE_TOKENS], before, scope=scope)])
        chunks = drive(core, [request(prompt, PARAMS, scope=scope)])["r"]
        said.append(bits(chunks))
        found.append(chunks[0].cached_tokens)
    return said, found


def test_cold_and_warm_are_equal_for_every_number_of_pages_found(
    tiny: dict[str, Path], codec: Codec
) -> None:
    core = coded_core(tiny["qwen2"], codec)
    window = core.info.window_tokens
    assert window is not None
    said, found = warm_runs(core)
    assert found == [pages * PAGE_TOKENS // window * window for pages in range(len(said))]
    assert all(one == said[0] for one in said)


def test_hits_that_end_inside_a_block_would_change_what_is_said(tiny: dict[str, Path]) -> None:
    """The test above can fail: rows would see codes that a cold run sees as they were computed."""
    core = coded_core(tiny["qwen2"], EightBit(256))
    manager = manager_of(core)
    manager.pool.spec = replace(manager.pool.spec, window_tokens=128)
    manager._closer._spec = manager.pool.spec
    manager._matcher._block_pages = 2
    said, found = warm_runs(core)
    assert [pages for pages, one in enumerate(said) if one != said[0]] == [2, 3]
    assert found[2] == found[3] == 128


def test_a_batch_a_tree_and_other_chunks_say_the_same(tiny: dict[str, Path], codec: Codec) -> None:
    trunk = prompt_of(270)
    prompts = {f"p{i}": [*trunk[: 270 - 6 * i], *prompt_of(20, i)] for i in range(3)}

    def asked(name: str) -> list[object]:
        core = coded_core(tiny["qwen2"], codec, chunk_tokens=512, threads=1)
        return bits(drive(core, [request(prompts[name], PARAMS, id=name)])[name])

    alone = {name: asked(name) for name in prompts}
    core = coded_core(tiny["qwen2"], codec, planner=eager(2), policy=ShareAll(), chunk_tokens=48)
    drive(core, [request(trunk, PARAMS, id="first")])
    others = [
        request(prompt_of(90 + 40 * i, 9 + i), PARAMS, id=f"o{i}", tenant="b") for i in (0, 1)
    ]
    got = drive(core, [*others, *(request(p, PARAMS, id=name) for name, p in prompts.items())])
    assert {name: bits(got[name]) for name in prompts} == alone
    assert core.stats().attention_tree_steps_total > 0
    assert [got[name][0].cached_tokens for name in prompts] == [256, 256, 256]


def test_preempted_and_resumed_sequences_say_the_same(tiny: dict[str, Path], codec: Codec) -> None:
    params = SamplingParams(max_tokens=80, temperature=0.8, seed=3, logprobs=1, ignore_eos=True)
    asked = [request(prompt_of(120, i), params, id=str(i)) for i in range(3)]
    roomy = drive(coded_core(tiny["qwen2"], codec), asked)
    core = coded_core(tiny["qwen2"], codec, tenants={"a": 1.0})
    manager_of(core).set_quotas({"a": 8}, 0)
    manager_of(core)._store.accounts["a"].quota_first = None
    got = drive(core, asked)
    assert core.stats().preemptions_total > 0
    assert {i: bits(got[i]) for i in got} == {i: bits(roomy[i]) for i in roomy}
    everything_is_given_back(core)


def everything_is_given_back(core: EngineCore) -> None:
    core.set_tenants({})
    pool = core._runner._parts.pool
    assert all(own.free_pages == own.num_pages for own in pool._classes)


def held_by_pages(core: EngineCore) -> int:
    """Return the bytes of all pages in use."""
    found = 0
    for own in core._runner._parts.pool._classes:
        page_bytes = sum(part.per_page * part.range.tile_bytes for part in own.parts)
        found += (own.num_pages - own.free_pages) * page_bytes
    return found


@pytest.mark.parametrize("window", [None, 128, 256])
def test_a_request_holds_the_bytes_of_the_closed_form(
    tiny: dict[str, Path], window: int | None
) -> None:
    codec = Float() if window is None else Hack(Layout.K2V2, window)
    core = coded_core(tiny["qwen2"], codec)
    pool = core._runner._parts.pool
    tile = pool._class(PageKind.STAGED).parts[0].range.tile_bytes
    seen: list[int] = []

    def look(_: int) -> None:
        for asked in core._requests.values():
            view, generated = asked.sequences[0].view, asked.sequences[0].generated
            if view is not None and generated:
                assert held_by_pages(core) == held_bytes(pool.spec, tile, view.length)
                seen.append(view.length)

    params = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    drive(core, [request(prompt_of(150), params)], look)
    assert seen == list(range(150, 449))


@pytest.mark.parametrize("beams", [False, True])
def test_forks_see_the_recent_tokens_of_their_source(
    tiny: dict[str, Path], codec: Codec, beams: bool
) -> None:
    """A request that may run one sequence at a time computes afresh what forks are handed."""
    params = SamplingParams(
        max_tokens=40, seed=5, n=3, logprobs=0, ignore_eos=True, use_beam_search=beams
    )
    asked = request(prompt_of(170, 4), params)
    core = coded_core(tiny["qwen2"], codec, tenants={"a": 1.0})
    together = drive(core, [asked])["r"]
    everything_is_given_back(core)
    narrow = coded_core(tiny["qwen2"], codec, tenants={"a": 1.0}, max_num_seqs=1)
    apart = drive(narrow, [asked])["r"]
    assert [bits(together, i) for i in range(3)] == [bits(apart, i) for i in range(3)]
    everything_is_given_back(narrow)


def test_a_page_is_encoded_once_in_each_layer_and_never_decoded(tiny: dict[str, Path]) -> None:
    codec = Watched(EightBit())
    core = coded_core(tiny["qwen2"], codec)
    layers = core.info.num_layers
    params = SamplingParams(max_tokens=100, temperature=0.7, seed=1, n=3, ignore_eos=True)
    drive(core, [request(prompt_of(200), params)])
    assert core.stats().encoded_pages_total * layers == codec.pages == 6 * layers
    assert codec.first == layers, "three prompt pages once for all, then one of each fork"
    drive(core, [request(prompt_of(200), PARAMS)])
    assert codec.pages == 7 * layers, "a block was found, the page after it was computed again"
    assert codec.first == layers
    assert sum(count > 1 for count in codec.seen.values()) == layers


def poison(core: EngineCore, token: int) -> None:
    """Make a token's embedding infinite: its keys and values are not finite from then on."""
    table = core._runner._parts.model._model.get_submodule("model.embed_tokens")
    assert isinstance(table, Embedding)
    table._rows[token] = float("inf")


@pytest.mark.parametrize("codec", ["k2v2"], indirect=True)
def test_what_cannot_be_stored_fails_its_request_alone(tiny: dict[str, Path], codec: Codec) -> None:
    bad, good = prompt_of(150, 1), prompt_of(140, 2)
    bad[100] = 250
    core = coded_core(tiny["qwen2"], codec)
    expected = bits(drive(core, [request(good, PARAMS, scope="before")])["r"])
    poison(core, 250)
    got = drive(
        core, [request(bad, PARAMS, id="bad"), request(good, PARAMS, id="good", tenant="b")]
    )
    assert bits(got["good"]) == expected
    (failed,) = got["bad"]
    assert failed.finish is FinishReason.ERROR
    assert failed.error is not None
    assert failed.error.startswith("K of layer 0, KV head 0, isn't finite")
    again = drive(core, [request(bad[:64], PARAMS, id="again")])["again"]
    assert again[-1].finish is FinishReason.LENGTH
    assert again[0].cached_tokens == 0
    everything_is_given_back(core)


def test_the_window_is_a_setting_and_part_of_the_tag(tiny: dict[str, Path]) -> None:
    core = core_for(tiny["qwen2"], kv="k2v2", kv_window_tokens=256)
    assert core.info.window_tokens == 256
    assert [*core.caches.managers] == ["k2v2-w256"]
    with pytest.raises(ConfigError, match="window_tokens is 64; it must be a positive multiple"):
        core_for(tiny["qwen2"], kv="k2v2", kv_window_tokens=64)


def test_an_error_of_the_codec_names_layer_and_head() -> None:
    error = NonFiniteKV("V", 3).in_layer(7)
    assert isinstance(error, EngineError)
    assert (error.what, error.head, error.layer) == ("V", 3, 7)
    assert str(error).startswith("V of layer 7, KV head 3, isn't finite")
