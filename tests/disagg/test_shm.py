"""Rings in shared memory: nothing is written over, and only this user's rings are opened."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeep.disagg.connector import Channel
from kvkeep.disagg.options import LinkOptions, PaceOptions
from kvkeep.disagg.shm import FOLDER, Ring, ShmConnector, open_ring, socket_path
from kvkeep.disagg.wire import Beat, Block, Freed, Mapped, control_bytes, pages_header
from kvkeep.errors import ConfigError, LinkLost, WireError

BLOCK = Block(1, 0, 1, 0, 1, bytes(16))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = set(FOLDER.glob("kvkeep-*"))
    yield
    end = time.monotonic() + 30
    while left := set(FOLDER.glob("kvkeep-*")) - before:  # tests beside this one have theirs too
        assert time.monotonic() < end, left
        time.sleep(0.05)


@example([250, 250, None, 100])  # the second one ends where the ring does
@given(st.lists(st.one_of(st.none(), st.integers(1, 300)), max_size=60))
@settings(max_examples=30)
def test_a_ring_keeps_every_place_until_it_is_freed(doings: list[int | None]) -> None:
    ring = Ring(500)
    theirs = open_ring(ring.name, 500)
    taken: deque[tuple[int, bytes]] = deque()
    for number, size in enumerate(doings):
        if size is None:
            if taken:
                at, data = taken.popleft()
                assert theirs[at : at + len(data)] == data
                ring.free()
            continue
        data = bytes([number % 256]) * size
        at_or_none = ring.put(data)
        if at_or_none is None:
            assert taken, "an empty ring takes whatever it can hold"
        else:
            taken.append((at_or_none, data))
        for at, data in taken:
            assert theirs[at : at + len(data)] == data
    theirs.close()
    ring.close()


def test_what_no_ring_holds_or_frees_is_refused() -> None:
    ring = Ring(100)
    with pytest.raises(WireError, match="larger than the ring's 100"):
        ring.put(bytes(101))
    with pytest.raises(WireError, match="freed more"):
        ring.free()
    with pytest.raises(WireError, match="not as long"):
        open_ring(ring.name, 99)
    ring.close()
    with pytest.raises(WireError, match="can't be opened"):
        open_ring(ring.name, 100)
    for name in ("../etc/passwd", "kvkeep-0", ring.name + "/x"):
        with pytest.raises(WireError, match="none that a worker gives"):
            open_ring(name, 100)


@asynccontextmanager
async def joined(tmp_path: Path, **options: int) -> AsyncIterator[tuple[Channel, Channel]]:
    link = LinkOptions(listen=f"shm://{tmp_path}/socket", silence_s=1.0, **options)  # type: ignore[arg-type]
    server, arrived = ShmConnector(link), asyncio.Queue[Channel]()
    leave = asyncio.Event()

    async def accepted(channel: Channel) -> None:
        arrived.put_nowait(channel)
        await leave.wait()

    address = await server.listen(link.listen, accepted)
    there = await ShmConnector(link).dial(address)
    here = await arrived.get()
    try:
        yield here, there
    finally:
        leave.set()
        here.close()
        there.close()
        server.close()
        await asyncio.sleep(0.01)


async def test_frames_pass_through_a_ring_smaller_than_they_are_together(tmp_path: Path) -> None:
    async with joined(tmp_path, window_bytes=1) as (here, there):
        payloads = [bytes([i]) * 400_000 for i in range(12)]

        async def send() -> None:
            for payload in payloads:
                await here.send((pages_header(BLOCK, payload), payload))
            await here.send((control_bytes(Beat()),))

        async def freed() -> None:
            await here.receive()

        sending, hearing = asyncio.create_task(send()), asyncio.create_task(freed())
        for payload in payloads:
            frame = await there.receive()
            assert frame.block == BLOCK
            assert frame.payload == payload
        assert (await there.receive()).control() == Beat()
        await sending
        hearing.cancel()
        assert here.stats.name == "shared memory"
        assert here.stats.sent_pages_bytes == 12 * 400_000
        assert here.stats.sent_bytes < 10_000, "the socket carries headers alone"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (Freed(), "ring that there is not"),
        (Mapped("kvkeep-" + "0" * 32, 100, 0, pages_header(BLOCK, b"x")), "can't be opened"),
    ],
)
async def test_records_about_rings_that_are_not_there_are_refused(
    tmp_path: Path, record: Freed | Mapped, why: str
) -> None:
    async with joined(tmp_path) as (here, there):
        await there.send((control_bytes(record),))
        with pytest.raises(WireError, match=why):
            await here.receive()


@pytest.mark.parametrize("case", ["outside", "not pages", "no header"])
async def test_a_place_that_holds_no_frame_is_refused(tmp_path: Path, case: str) -> None:
    ring = Ring(4096)
    header = pages_header(BLOCK, bytes(10))
    beat = control_bytes(Beat())
    at = 4090 if case == "outside" else 0
    if case == "not pages":
        ring.put(beat[48:])
        header = beat[:48]
    if case == "no header":
        header = bytes(48)
    async with joined(tmp_path) as (here, there):
        await there.send((control_bytes(Mapped(ring.name, 4096, at, header)),))
        with pytest.raises(WireError):
            await here.receive()
    ring.close()


async def test_addresses_and_paces_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        socket_path("shm://relative")
    with pytest.raises(ConfigError, match="emulates no link"):
        ShmConnector(LinkOptions(pace=PaceOptions(bytes_per_s=1e6)))
    with pytest.raises(LinkLost, match="no worker answers"):
        await ShmConnector(LinkOptions()).dial(f"shm://{tmp_path}/nobody")
    with pytest.raises(ConfigError, match="can't be used"):
        await ShmConnector(LinkOptions()).listen(
            f"shm://{tmp_path}/no/folder", lambda _: asyncio.sleep(0)
        )


def names_in(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir()]


async def test_workers_that_listen_in_one_folder_have_sockets_of_their_own(tmp_path: Path) -> None:
    connectors = [ShmConnector(LinkOptions()) for _ in range(2)]

    async def accepted(channel: Channel) -> None:
        channel.close()

    found = [await one.listen(f"shm://{tmp_path}/", accepted) for one in connectors]
    assert len({*found}) == len(names_in(tmp_path)) == 2
    for connector in connectors:
        connector.close()
    assert not names_in(tmp_path)


def test_a_ring_without_room_is_refused_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, begin: int, end: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    before = {*FOLDER.iterdir()}
    with pytest.raises(LinkLost, match="no room for 1048576 bytes"):
        Ring(1 << 20)
    assert not {one for one in {*FOLDER.iterdir()} - before if one.name.startswith("kvkeep-")}
