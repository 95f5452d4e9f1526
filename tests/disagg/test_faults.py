"""Whatever a link or a prefill worker does, answers are right, in time, and nothing stays held."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from kvkeep.disagg import prefill
from kvkeep.disagg.decode import DecodeSide
from kvkeep.disagg.handover import SplitClient
from kvkeep.disagg.options import LinkOptions, PaceOptions
from kvkeep.disagg.prefill import PrefillSide
from kvkeep.disagg.wire import NO_TAG, Lost, Want, WantRows
from kvkeep.disagg.worker import spawn_worker
from kvkeep.engine.api import FinishReason, Handover, SamplingParams
from kvkeep.errors import ConfigError
from tests.disagg.faulty import Fault, FaultyLink, faulty_link
from tests.disagg.pairs import (
    QUICK,
    Pair,
    Worker,
    answer,
    answers,
    engine_options,
    held,
    pair_of,
    until,
)
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens

SOME = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = prompt_of(511, 5)
LONG_S = 8.0
"""No link's patience, but what a loaded machine may take for a second's work."""
SLOW = PaceOptions(bytes_per_s=2e6, latency_s=0.002)
"""On it the pages of PROMPT take about a tenth of a second."""


@pytest.fixture(scope="module")
def wanted(tiny: dict[str, Path]) -> list[int]:
    core = core_for(tiny["qwen2"], chunk_tokens=128)
    return tokens(drive(core, [request(PROMPT, SOME)])["r"])


@asynccontextmanager
async def through(link: FaultyLink, model: Path, options: LinkOptions) -> AsyncIterator[Pair]:
    """Yield a pair whose pages pass over a link with faults."""
    options = msgspec.structs.replace(options, advertise=link.address)
    async with pair_of(engine_options(model, shield="off"), link=options) as pair:
        link.target = pair.sends.address
        yield pair


@pytest.mark.parametrize(
    ("fault", "after_bytes"),
    [
        ("stall", 300),
        ("drop", 60_000),
        ("corrupt", 0),
        ("corrupt", 60_000),
        *(
            pytest.param(fault, after_bytes, marks=pytest.mark.slow)
            for fault in ("stall", "drop", "corrupt")
            for after_bytes in (20, 5_000, 30_000, 90_000)
        ),
    ],
)
async def test_a_link_that_fails_costs_time_and_no_token(
    tiny: dict[str, Path], wanted: list[int], fault: Fault, after_bytes: int
) -> None:
    options = msgspec.structs.replace(QUICK, silence_s=1.0)
    async with faulty_link() as link, through(link, tiny["qwen2"], options) as pair:
        link.fail(fault, after_bytes)
        begun = time.monotonic()
        (got,) = await answers(pair.client, request(PROMPT, SOME))
        assert time.monotonic() - begun < LONG_S
        assert tokens(got) == wanted
        assert pair.faults()
        await pair.quiet()
        link.fail("none", 0)
        await asyncio.sleep(0.6)  # a worker that failed is left alone for half a second
        other = request(prompt_of(300, 6), SOME, id="after")
        before = pair.receives.installed_pages
        await answers(pair.client, other)
        assert pair.receives.installed_pages == before + 4
        await pair.quiet()


async def test_a_corrupt_page_is_computed_again_from_that_page_on(
    tiny: dict[str, Path], wanted: list[int]
) -> None:
    async with faulty_link() as link, through(link, tiny["qwen2"], QUICK) as pair:
        link.fail("corrupt", 30_000)
        (got,) = await answers(pair.client, request(PROMPT, SOME))
        assert tokens(got) == wanted
        assert pair.faults().get("pages that do not open") == 1
        assert link.connections == 1, "the link goes on"


async def test_a_client_that_leaves_ends_both_sides_soon(
    tiny: dict[str, Path],
) -> None:
    slow = msgspec.structs.replace(QUICK, pace=PaceOptions(bytes_per_s=1e5))
    async with pair_of(engine_options(tiny["qwen2"], shield="off"), link=slow) as pair:
        for seed, wait_s in enumerate((0.0, 0.05, 0.3)):
            stream = pair.client.submit(request(prompt_of(500, seed), SOME, id=str(seed)))
            reading = asyncio.ensure_future(answer(stream))
            await asyncio.sleep(wait_s)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await stream.aclose()
            await pair.quiet(within_s=2.0)  # one, and one for a loaded machine


async def test_a_deadline_ends_a_request_whose_pages_never_come(tiny: dict[str, Path]) -> None:
    async with faulty_link() as link, through(link, tiny["qwen2"], QUICK) as pair:
        await answers(pair.client, request(prompt_of(100, 9), SOME, id="joins"))
        link.fail("stall", 0)
        (got,) = await answers(pair.client, request(PROMPT, SOME, deadline_s=0.3))
        assert got[-1].finish is FinishReason.DEADLINE
        await pair.quiet()


@pytest.mark.parametrize("deadline_s", [None, 600.0])
async def test_transfers_expire(
    tiny: dict[str, Path], wanted: list[int], deadline_s: float | None
) -> None:
    short = msgspec.structs.replace(QUICK, pace=PaceOptions(bytes_per_s=5e4), expires_s=0.3)
    async with pair_of(engine_options(tiny["qwen2"], shield="off"), link=short) as pair:
        begun = time.monotonic()
        asked = request(PROMPT, SOME, deadline_s=deadline_s)
        for side in (pair.sends, pair.receives):
            assert side._ends_s(asked) - time.monotonic() <= 0.3
        (got,) = await answers(pair.client, asked)
        assert tokens(got) == wanted
        assert time.monotonic() - begun < LONG_S
        await pair.quiet()


class Asker:
    """One that asks, and hears what it is told."""

    closed = False

    def __init__(self) -> None:
        self.told: list[object] = []

    def put(self, item: object) -> None:
        self.told.append(item)


def test_wishes_that_come_before_their_prompts_are_bounded(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "MOST_EARLY", 3)
    now = 100.0
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    side = PrefillSide(engine_options(tiny["qwen2"]), QUICK, inbox, clock=lambda: now)  # type: ignore[arg-type]
    asker = Asker()
    for number in range(4):
        side._heard(asker, Want(number, f"{number}", 2, 3, b"", NO_TAG))  # type: ignore[arg-type]
    side._heard(asker, WantRows(4, "0", b"", NO_TAG))  # type: ignore[arg-type]
    side.after(())
    assert asker.told == [Lost(3, 0), Lost(4, 0)], "what there is room for waits"
    now += prefill.EARLY_S
    side.after(())
    assert asker.told[2:] == [Lost(0, 2), Lost(1, 2), Lost(2, 2)], "and not for ever"


async def test_a_prefill_that_takes_too_long_is_done_here(
    tiny: dict[str, Path], wanted: list[int]
) -> None:
    engine = engine_options(tiny["qwen2"], shield="off")
    async with pair_of(engine, patience_s=0.0) as pair:
        (got,) = await answers(pair.client, request(PROMPT, SOME))
        assert tokens(got) == wanted
        await pair.quiet()


async def test_engines_that_differ_are_refused_naming_both_values(tiny: dict[str, Path]) -> None:
    engine = engine_options(tiny["qwen2"], shield="off")
    other = msgspec.structs.replace(engine, kv="k2v2")
    with pytest.raises(
        ConfigError, match=r"kv: the decode worker has 'k2v2' and the prefill.*'bf16"
    ):
        async with pair_of(engine, other=other):
            pass


async def test_a_link_between_engines_that_differ_is_refused_by_both(
    tiny: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_options(tiny["qwen2"], shield="off")
    other = msgspec.structs.replace(engine, kv="k2v2")
    sends, goes_on = Worker("prefill", engine, QUICK), Worker("decode", other, QUICK)
    there, here = sends.start(), goes_on.start()
    link = (await there.info()).link
    await here.info()
    await here.set_tenants({"a": 0.9})
    asked = msgspec.structs.replace(
        request(PROMPT, SOME), handover=Handover(role="decode", link=link)
    )
    stream = here.submit(asked)
    sides = (sends.side, goes_on.side)
    await until(lambda: all(side.faults.counts["refused"] for side in sides))
    assert "codec: this worker stores [('float'," in caplog.text
    assert "codec: this worker stores [('k2v2'," in caplog.text
    here.begin("r", (), ())
    core = core_for(tiny["qwen2"], chunk_tokens=128, kv="k2v2")
    assert tokens(await answer(stream)) == tokens(drive(core, [request(PROMPT, SOME)])["r"])
    await here.close()
    await there.close()


async def test_a_killed_prefill_process_costs_time_and_no_token(
    tiny: dict[str, Path], wanted: list[int]
) -> None:
    engine = engine_options(tiny["qwen2"], shield="off")
    slow = msgspec.structs.replace(QUICK, pace=SLOW)
    there, worker = spawn_worker("prefill", engine, slow), Worker("decode", engine, slow)
    client = SplitClient(there, worker.start(), least_tokens=64)
    await client.info()
    await client.set_tenants({"a": 0.9})
    (first,) = await answers(client, request(PROMPT, SOME, id="before"))
    assert tokens(first) == wanted
    assert isinstance(worker.side, DecodeSide)
    assert worker.side.installed_pages == 7
    asked = [request(prompt_of(450, i), SOME, id=str(i)) for i in range(4)]
    running = asyncio.ensure_future(answers(client, *asked))
    await asyncio.sleep(0.1)
    os.kill(there._transport._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    got = await asyncio.wait_for(running, 20)
    core = core_for(tiny["qwen2"], chunk_tokens=128)
    told = drive(core, asked)
    assert [tokens(chunks) for chunks in got] == [tokens(told[str(i)]) for i in range(4)]
    (late,) = await answers(client, request(PROMPT, SOME, id="after"))
    assert tokens(late) == wanted
    assert held(worker) == []
    await client.close()


async def test_workers_of_which_one_seals_nothing_are_refused_naming_both(
    tiny: dict[str, Path],
) -> None:
    one, other = (engine_options(tiny["qwen2"], shield=mode) for mode in ("seal", "off"))
    both = r"shield: the decode worker has 'off: .*' and the prefill worker \"seal: .*\"; start"
    with pytest.raises(ConfigError, match=both):
        async with pair_of(one, other=other):
            pass
