"""Rows behind a prompt's last whole pages come beside them: computed once, found by nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvkeep.cache.tiers import OpenRows
from kvkeep.disagg import decode, outgoing_rows
from kvkeep.disagg.incoming_rows import IncomingRows
from kvkeep.disagg.outgoing_rows import OutgoingRows, RowsWish
from kvkeep.disagg.outlet import Batch
from kvkeep.disagg.prefill import NothingBelow
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.wire import DESCRIPTOR_BYTES, Kind, Lost
from kvkeep.engine.api import Handover
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.runner import Stepped
from kvkeep.engine.speeds import Speeds
from kvkeep.engine.work import Work
from kvkeep.errors import SealError, WireError
from kvkeep.shield.plain import PlainSealer
from kvkeep.types import PageTag
from tests.cache.player import make_manager, prompt
from tests.disagg.pairs import QUICK, Pair, answers, engine_options, pair_of
from tests.disagg.test_handover import DRAWN, PROMPTS, SOME, alone
from tests.e2e.test_composition import prompt_of
from tests.engines import request, tokens


@contextmanager
def computed(core: EngineCore) -> Iterator[dict[str, int]]:
    """Yield by request the first row that an engine computes."""
    first: dict[str, int] = {}
    runner = core._runner
    step = runner.step

    def watched(work: Sequence[Work]) -> Stepped:
        for item in work:
            first.setdefault(item.sequence.request.spec.id, item.start)
        return step(work)

    runner.step = watched  # type: ignore[method-assign]
    yield first
    runner.step = step  # type: ignore[method-assign]


async def played(pair: Pair, wanted: list[list[Any]]) -> dict[str, int]:
    """Return the first rows that the decode worker computes of the prompts, answered rightly."""
    with computed(pair.decode.core) as first:
        asked = [request(one, DRAWN, id=str(i)) for i, one in enumerate(PROMPTS)]
        got = await answers(pair.client, *asked)
    assert [tokens(chunks) for chunks in got] == [tokens(chunks) for chunks in wanted]
    await pair.quiet()
    assert not pair.faults()
    return first


WHOLE = {str(i): len(one) for i, one in enumerate(PROMPTS)}
"""Where each answer begins."""


@pytest.mark.parametrize(
    "forms",
    [
        {"kv": "bf16"},
        {"kv": "k2v2"},
        {"kv": "k4v2", "shield": "seal"},
        {"kv": "auto", "kv_auto_tokens": 300},
    ],
)
async def test_no_row_of_a_prompt_is_computed_twice(
    tiny: dict[str, Path], forms: dict[str, Any]
) -> None:
    wanted = alone(tiny["qwen2"], DRAWN, **{k: v for k, v in forms.items() if k != "shield"})
    async with pair_of(engine_options(tiny["qwen2"], **{"shield": "off", **forms})) as pair:
        assert await played(pair, wanted) == WHOLE


async def test_a_step_that_has_begun_before_they_are_asked_for_loses_none(
    tiny: dict[str, Path],
) -> None:
    """The prefill worker is done before the decode worker hears of the request."""
    engine = engine_options(tiny["qwen2"], shield="off", kv="k2v2", chunk_tokens=512)
    wanted = alone(tiny["qwen2"], SOME, kv="k2v2")
    async with pair_of(engine) as pair:
        at, began = pair.decode.core, []

        def late(spec: Any) -> None:
            while not any(known[1] for known in pair.sends._specs.values()):
                began.append(1)
                time.sleep(0.005)
            submit(spec)

        submit, at.submit = at.submit, late  # type: ignore[method-assign]
        with computed(at) as first:
            (got,) = await answers(pair.client, request(PROMPTS[1], SOME, id="late"))
        assert began, "it was late"
        assert first == {"late": 200}
        assert tokens(got) == tokens(wanted[1])
        await pair.quiet()


async def test_rows_that_are_cached_but_for_the_last_block_are_sent_alone(
    tiny: dict[str, Path],
) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off", kv="k2v2")) as pair:
        await answers(pair.client, request(PROMPTS[3], SOME, id="first"))
        await pair.quiet()
        pages = pair.receives.installed_pages
        again = [*PROMPTS[3][:384], *prompt_of(70, 3)]
        with computed(pair.decode.core) as first:
            await answers(pair.client, request(again, SOME, id="again"))
        assert first == {"again": len(again)}
        assert pair.receives.installed_pages == pages
        await pair.quiet()


@pytest.mark.parametrize("side", [decode, outgoing_rows])
async def test_what_there_is_no_room_for_is_computed_again(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, side: Any
) -> None:
    if side is decode:
        monkeypatch.setattr(decode, "MOST_ROWS_BYTES", 0)
    else:
        monkeypatch.setattr("kvkeep.disagg.prefill.OutgoingRows", lambda: OutgoingRows(0))
    wanted = alone(tiny["qwen2"], DRAWN, kv="k2v2")
    async with pair_of(engine_options(tiny["qwen2"], shield="off", kv="k2v2")) as pair:
        first = await played(pair, wanted)
        assert first == {str(i): len(one) // 128 * 128 for i, one in enumerate(PROMPTS)}


async def test_what_a_link_brings_later_than_it_is_computed_is_computed(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt without a whole block is not split there: nothing of it would be sent."""
    monkeypatch.setattr("kvkeep.disagg.prefill.EARLY_S", 1e9)  # nothing is kept that nobody wants
    slow = Speeds(link_bytes_per_s=1e3, token_s=1e-3)
    engine = engine_options(tiny["qwen2"], shield="off", kv="k2v2")
    wanted = alone(tiny["qwen2"], DRAWN, kv="k2v2")
    async with pair_of(engine, link=msgspec.structs.replace(QUICK, speeds=slow)) as pair:
        asked: list[str] = []
        submit = pair.prefill.core.submit

        def noted(spec: Any) -> None:
            asked.append(spec.id)
            submit(spec)

        pair.prefill.core.submit = noted  # type: ignore[method-assign]
        first = await played(pair, wanted)
        assert first == {str(i): len(one) // 128 * 128 for i, one in enumerate(PROMPTS)}
        assert asked == ["1", "2", "3"]
        assert len(PROMPTS[0]) < 128
    fast = Speeds(link_bytes_per_s=1e9, token_s=1e-3)
    async with pair_of(engine, link=msgspec.structs.replace(QUICK, speeds=fast)) as pair:
        assert await played(pair, wanted) == WHOLE


async def test_where_tokens_may_be_evicted_no_rows_are_sent(tiny: dict[str, Path]) -> None:
    engine = engine_options(tiny["qwen2"], shield="off", evict="corm")
    async with pair_of(engine) as pair:
        with computed(pair.decode.core) as first:
            await answers(pair.client, request(PROMPTS[1], SOME, id="x"))
        assert first["x"] < len(PROMPTS[1])
        assert not len(pair.sends._rows)
        await pair.quiet()


# One side at a time

TOKENS = prompt(1, 2, tail=9)
TAG = PageTag("scope-a", "float")
LAYERS = 2
ROW = 1000


def names(tokens: Any = TOKENS, tenant: str = "a") -> PromptPages:
    manager = make_manager(16, tier=NothingBelow())
    spec = request(tokens, tenant=tenant)
    return PromptPages(manager, spec, TAG, PlainSealer(), row_bytes=ROW)


@dataclass
class Heard:
    """An outlet that only notes."""

    room: bool = True
    sent: list[Any] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    def has_room(self, size: int) -> bool:
        return self.room

    def put(self, item: Any) -> None:
        self.sent.append(item)

    def drop(self, number: int) -> None:
        self.dropped.append(number)

    def layers(self) -> list[bytes]:
        return [data for batch in self.sent if isinstance(batch, Batch) for data in batch.data]

    def lost(self) -> list[int]:
        return [item.request for item in self.sent if isinstance(item, Lost)]


@dataclass
class Rig:
    """Rows of one prompt on their way out."""

    rows: OutgoingRows = field(default_factory=OutgoingRows)
    heard: Heard = field(default_factory=Heard)
    spec: Any = field(default_factory=lambda: request(TOKENS, id="r"))
    data: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        pages = names()
        self.layers = pages.num_layers
        self.data = [bytes([n]) * ROW * pages.open_tokens for n in range(self.layers)]

    def ask(self, number: int = 1, *, tag: PageTag = TAG, ended: bool = False) -> None:
        pages = names()
        rows = IncomingRows("r", number, pages, len(TOKENS), 9.0)
        want = msgspec.structs.replace(rows.want(), tag=tag.digest())
        wish = RowsWish(self.heard, want, self.spec, pages, 9.0)  # type: ignore[arg-type]
        self.rows.ask(wish, ended=ended)

    def store(self, upto: int | None = None) -> None:

        stored = OpenRows("r", TAG, 9, np.zeros(1, np.int32))
        for layer, data in enumerate(self.data[:upto]):
            self.rows.stored(self.spec, stored, layer, data)


@pytest.mark.parametrize("order", ["asked first", "stored first", "computed first"])
def test_all_layers_are_sent_once_in_order_whoever_comes_first(order: str) -> None:
    rig = Rig()
    if order == "asked first":
        rig.ask()
    rig.store()
    if order == "stored first":
        rig.ask()
    rig.rows.computed("r", 10.0)
    if order == "computed first":
        rig.ask(ended=True)
    rig.rows.pump(0.0)
    assert rig.heard.layers() == rig.data
    assert {batch.kind for batch in rig.heard.sent} == {Kind.OPEN}
    assert not len(rig.rows), "nothing is kept of what was sent"
    rig.ask(2, ended=True)
    assert rig.heard.lost() == [2], "they are sent once"


def test_frames_are_sent_as_soon_as_they_are_large_enough() -> None:
    rig = Rig()
    rig.data = [bytes(DESCRIPTOR_BYTES)] * rig.layers
    rig.ask()
    rig.store(1)
    assert len(rig.heard.layers()) == 1


def test_what_has_no_room_waits_and_a_whole_prompts_rows_wait_for_its_end() -> None:
    rig = Rig(heard=Heard(room=False))
    rig.ask()
    rig.store()
    rig.rows.computed("r", 10.0)
    rig.rows.pump(0.0)
    assert not rig.heard.sent
    rig.heard.room = True
    rig.rows.pump(0.0)
    assert rig.heard.layers() == rig.data

    handover = Handover(role="prefill", whole=True)
    whole = Rig(spec=msgspec.structs.replace(request(TOKENS, id="r"), handover=handover))
    whole.ask()
    whole.store()
    whole.rows.pump(0.0)
    assert not whole.heard.sent
    whole.rows.computed("r", 10.0)
    whole.rows.pump(0.0)
    assert whole.heard.layers() == whole.data


def test_who_asks_for_another_form_or_for_nothing_that_comes_is_told() -> None:
    rig = Rig()
    rig.ask(1)
    rig.ask(2, tag=PageTag("scope-a", "other"))
    rig.store()
    rig.rows.computed("r", 10.0)
    rig.rows.pump(0.0)
    assert rig.heard.lost() == [2]
    assert rig.heard.layers() == rig.data
    none = Rig()
    none.ask(3)
    none.store(1)
    none.rows.computed("r", 10.0)
    none.rows.pump(0.0)
    assert none.heard.lost() == [3], "a prompt that failed in the middle"


def test_nothing_is_kept_longer_than_somebody_may_ask() -> None:
    rig = Rig()
    rig.store()
    rig.rows.computed("r", 10.0)
    rig.rows.pump(9.9)
    assert len(rig.rows)
    rig.rows.pump(10.0)
    assert not len(rig.rows)
    gone = Rig()
    gone.ask()
    gone.store()
    gone.rows.end_where(lambda wish: wish.is_of(gone.heard, 1))  # type: ignore[arg-type]
    assert not len(gone.rows)
    assert (gone.heard.lost(), gone.heard.dropped) == ([1], [1])
    purged = Rig()
    purged.store()
    purged.rows.forget(lambda spec: spec.tenant == "a")
    assert not len(purged.rows)


def test_what_exceeds_the_bound_is_not_kept() -> None:
    rig = Rig(rows=OutgoingRows(9 * ROW * (LAYERS + 1)))
    rig.store()
    other = request(TOKENS, id="other")

    stored = OpenRows("other", TAG, 9, np.zeros(1, np.int32))
    for layer, data in enumerate(rig.data):
        rig.rows.stored(other, stored, layer, data)
    kept = [len(one.layers) for one in rig.rows._leaving.values()]
    assert kept == [rig.layers, 0], "nothing is kept of what is not kept whole"
    assert rig.layers == LAYERS


def rows_there(rows: IncomingRows) -> bool:
    return rows.state == "there"


def incoming() -> IncomingRows:
    return IncomingRows("r", 1, names(), len(TOKENS), 9.0)


def test_rows_are_there_once_every_layer_is_and_are_given_once() -> None:
    rows = incoming()
    data = [memoryview(bytes([n]) * ROW * 9) for n in range(rows.pages.num_layers)]
    assert (rows.first, rows.end) == (128, 137)
    for layer, one in enumerate(data):
        assert not rows_there(rows)
        block = rows.pages.open_block(1, layer, 1)
        rows.check(block)
        rows.arrived(block, [one])
    assert rows_there(rows)
    assert [bytes(one) for one in rows.take()] == [bytes(one) for one in data]
    assert not rows_there(rows)
    assert rows.size == 0


def test_rows_that_were_not_asked_for_are_refused() -> None:
    rows = incoming()
    good = rows.pages.open_block(1, 0, 1)
    for wrong in (
        good._replace(first_page=1),
        good._replace(pages=2),
        good._replace(layers=rows.pages.num_layers + 1),
        good._replace(tag=bytes(16)),
    ):
        with pytest.raises(WireError, match="not asked for"):
            rows.check(wrong)
    rows.lose(0)
    rows.arrived(good, [memoryview(b"")])
    assert rows.state == "lost"


@pytest.mark.parametrize(
    "other", [{"tokens": [*TOKENS[:-1], 7]}, {"tokens": [7, *TOKENS[1:]]}, {"tenant": "b"}]
)
def test_rows_open_for_the_same_prompt_in_the_same_layers_alone(other: dict[str, Any]) -> None:
    pages = names()
    block = pages.open_block(1, 0, 1)
    sealed = pages.seal_open(block, bytes(ROW * 9))
    assert len(names().open_open(block, sealed)) == 1
    with pytest.raises(SealError):
        names(**other).open_open(block, sealed)
    with pytest.raises(SealError):
        names().open_open(block._replace(layer=1), sealed)
    with pytest.raises(SealError):
        names().open(block._replace(first_page=0, pages=1), sealed)
