"""How a decode worker gets at a prompt's pages: what is compared, and that it went that way."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench import disagg_ways
from bench.disagg_load import Played
from bench.disagg_ways import APART, MEMORY, TCP, WAYS, Size, check, figures_of, link_of, row_of
from kvkeep.disagg.options import check_apart
from tests.disagg.pairs import engine_options

ONE = Played(
    prompt_tokens=512,
    answer_tokens=32,
    at_s=0.0,
    ttft_s=1.0,
    jct_s=3.0,
    phases=(0.0, 1.0, 0.0, 0.3, 0.1, 1.55, 0.05),
    split=True,
    handover_s=0.001,
    received_bytes=60_000_000,
    received_pages=8,
)


def slower(times: float) -> Played:
    return msgspec.structs.replace(ONE, phases=tuple(times * one for one in ONE.phases))


def test_ways_are_compared_request_by_request() -> None:
    apart = msgspec.structs.replace(slower(4.0), received_pages=0, received_bytes=0)
    found = {TCP: [ONE, slower(2.0)], MEMORY: [slower(0.5), ONE], APART: [apart, apart]}
    moved, token = (one.estimate for one in figures_of(found))
    assert (moved.median, moved.low, moved.high) == (2.0, 2.0, 2.0)
    assert (token.low, token.median, token.high) == (2.0, 3.0, 4.0)
    row = row_of(TCP, found[TCP][:1])
    assert row["moved_ms"] == pytest.approx(400)
    assert row["mbytes_per_s"] == pytest.approx(150)
    assert row["token_ms"] == pytest.approx(50)
    assert row_of(APART, found[APART])["mbytes_per_s"] is None


def test_pages_that_went_another_way_are_seen() -> None:
    few = msgspec.structs.replace(ONE, received_pages=1)
    check(TCP, ONE)
    check(APART, few)
    for way, one in ((TCP, few), (MEMORY, few), (APART, ONE)):
        with pytest.raises(RuntimeError, match=f"{way}: {one.received_pages} pages were sent"):
            check(way, one)
    with pytest.raises(RuntimeError):
        check(TCP, msgspec.structs.replace(ONE, split=False))


def test_each_way_has_its_link(tmp_path: Path) -> None:
    links = {way: link_of(way, tmp_path) for way in WAYS}
    assert [links[way].listen.partition(":")[0] for way in WAYS] == ["tcp", "shm", "tcp"]
    assert [links[way].attend_apart for way in WAYS] == [None, None, 1]


@pytest.mark.slow
async def test_every_way_is_played(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    options = engine_options(tiny["qwen2"], shield="off", kv="bf16")
    for way in WAYS:
        check_apart(options, link_of(way, tiny["qwen2"]))
    monkeypatch.setattr(disagg_ways, "engine_options", lambda *_: options)
    monkeypatch.setattr("bench.disagg_workers.VOCABULARY", 200)
    found = await disagg_ways.play(Size(200, 1, 2), tiny["qwen2"], 2)
    assert {way: len(played) for way, played in found.items()} == dict.fromkeys(WAYS, 1)
    assert all(disagg_ways.token_s(played[0]) > 0 for played in found.values())
