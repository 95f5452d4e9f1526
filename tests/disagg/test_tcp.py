"""Connections between workers: frames both ways, mutual TLS, refusals, emulated links."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvkeep.disagg.connector import Channel, Pacer
from kvkeep.disagg.options import LinkOptions, PaceOptions, TlsFiles
from kvkeep.disagg.tcp import TcpConnector, host_port
from kvkeep.disagg.wire import Beat, Block, Lost, control_bytes, pages_header
from kvkeep.errors import ConfigError, LinkLost
from tests.disagg.certificates import Authority
from tests.disagg.pairs import until

BLOCK = Block(1, 0, 1, 0, 1, bytes(16))


def options(tls: TlsFiles | None = None, **changes: object) -> LinkOptions:
    return LinkOptions(tls=tls, dial_s=1.0, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def joined(one: LinkOptions, other: LinkOptions) -> AsyncIterator[tuple[Channel, Channel]]:
    """Yield both ends of a connection: the one that listens first."""
    server, arrived = TcpConnector(one), asyncio.Queue[Channel]()
    leave = asyncio.Event()

    async def accepted(channel: Channel) -> None:
        arrived.put_nowait(channel)
        await leave.wait()

    address = await server.listen(one.listen, accepted)
    dialled = await TcpConnector(other).dial(address)
    try:
        await dialled.send((control_bytes(Beat()),))
        here = await asyncio.wait_for(arrived.get(), 1)
        await here.receive()
        try:
            yield here, dialled
        finally:
            here.close()
    finally:
        leave.set()
        dialled.close()
        server.close()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("sealed", [False, True])
async def test_frames_arrive_in_order_both_ways(tmp_path: Path, sealed: bool) -> None:
    authority = Authority(tmp_path / "cluster")
    one, other = (
        options(authority.worker(name) if sealed else None) for name in ("prefill", "decode")
    )
    async with joined(one, other) as (here, there):
        payload = bytes(range(256)) * 8192
        assert here.stats.name == ("tls over tcp" if sealed else "tcp")
        sending = asyncio.create_task(here.send((pages_header(BLOCK, payload), payload)))
        frame = await there.receive()
        await sending
        assert (frame.block, bytes(frame.payload)) == (BLOCK, payload)
        assert (here.stats.sent_pages_frames, here.stats.sent_pages_bytes) == (1, len(payload))
        for number in range(50):
            await there.send((control_bytes(Lost(1, number)),))
        assert [(await here.receive()).control() for _ in range(50)] == [
            Lost(1, number) for number in range(50)
        ]
        here.close()
        with pytest.raises(LinkLost):
            await there.receive()
        with pytest.raises(LinkLost):
            await here.send((control_bytes(Beat()),))


@pytest.mark.parametrize("stranger", ["another authority's", "none"])
async def test_a_worker_without_the_clusters_certificate_cannot_join(
    tmp_path: Path, stranger: str
) -> None:
    one = options(Authority(tmp_path / "cluster").worker("prefill"))
    foreign = Authority(tmp_path / "other").worker("decode")
    other = options(foreign if stranger != "none" else None)
    reached = []

    async def accepted(channel: Channel) -> None:
        reached.append(channel)

    server = TcpConnector(one)
    address = await server.listen(one.listen, accepted)
    with pytest.raises(LinkLost):
        await talk(TcpConnector(other), address)
    assert not reached
    server.close()
    await asyncio.sleep(0.01)


async def talk(connector: TcpConnector, address: str) -> None:
    channel = await connector.dial(address)
    try:
        await channel.send((control_bytes(Beat()),))
        await channel.receive()
    finally:
        channel.close()


async def test_other_hosts_are_refused_without_tls() -> None:
    for address in ("tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://example.org:1"):
        with pytest.raises(ConfigError, match=r"give tls files, or use 127\.0\.0\.1"):
            await TcpConnector(options()).listen(address, lambda _: asyncio.sleep(0))
    with pytest.raises(ConfigError, match="pages would pass in the clear"):
        await TcpConnector(options()).dial("tcp://10.0.0.1:1")


@pytest.mark.parametrize("address", ["", "udp://127.0.0.1:1", "tcp://", "tcp://x:99999", "tcp://x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        host_port(address)


async def test_a_port_in_use_and_files_that_are_none_are_named(tmp_path: Path) -> None:
    files = TlsFiles(certificate=str(tmp_path), key=str(tmp_path), authority=str(tmp_path))
    with pytest.raises(ConfigError, match=r"cluster_certificate: .* can't be used"):
        await TcpConnector(options(files)).dial("tcp://127.0.0.1:1")
    first = TcpConnector(options())
    address = await first.listen("tcp://127.0.0.1:0", lambda _: asyncio.sleep(0))
    with pytest.raises(ConfigError, match="can't be used"):
        await TcpConnector(options()).listen(address, lambda _: asyncio.sleep(0))
    first.close()


async def test_silence_and_nobody_are_told_apart() -> None:
    with pytest.raises(LinkLost, match="no worker answers"):
        await TcpConnector(options()).dial("tcp://127.0.0.1:1")
    async with joined(options(silence_s=0.05), options()) as (here, _):
        with pytest.raises(LinkLost, match=r"nothing came from another worker for 0\.05 s"):
            await here.receive()


async def test_an_emulated_link_takes_its_time_and_says_so() -> None:
    pace = PaceOptions(bytes_per_s=4e6, latency_s=0.1)
    async with joined(options(pace=pace), options()) as (here, there):
        assert here.stats.name == "tcp, emulated link of 0.032 Gbit/s and 100 ms"
        payload = bytes(800_000)
        begun = time.monotonic()
        sending = asyncio.create_task(here.send((pages_header(BLOCK, payload), payload)))
        await there.receive()
        assert time.monotonic() - begun > 0.2, "0.2 s of bandwidth and 0.1 s on the way"
        await sending


async def test_a_pacer_keeps_its_bandwidth_and_delays_nothing_twice() -> None:
    now, written = itertools.count(), []

    async def write(data: bytes | memoryview) -> None:
        written.append((next(now), len(data)))

    pacer = Pacer(PaceOptions(bytes_per_s=1e9, latency_s=0.0), write, clock=lambda: 0.0)
    running = asyncio.create_task(pacer.run())
    await pacer.send([bytes(200_000), b"end"])
    await until(lambda: sum(size for _, size in written) >= 200_003)
    running.cancel()
    assert sum(size for _, size in written) == 200_003
    assert max(size for _, size in written) == 64 << 10
