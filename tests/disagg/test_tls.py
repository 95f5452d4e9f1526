"""Workers under TLS, end to end: who has no certificate of the cluster's is refused, and told."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from kvkeep.disagg.connector import Channel
from kvkeep.disagg.handover import SplitClient
from kvkeep.disagg.options import LinkOptions, TlsFiles
from kvkeep.disagg.tcp import TcpConnector, host_port
from kvkeep.disagg.tls import context_of, refusal
from kvkeep.disagg.wire import Beat, control_bytes
from kvkeep.engine.api import SamplingParams
from kvkeep.errors import ConfigError, LinkLost
from tests.disagg.certificates import DAY, Authority
from tests.disagg.pairs import QUICK, Pair, Worker, answers, engine_options, until
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens

SOME = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
PROMPT = prompt_of(400, 5)
OVER = 5 * DAY
"""Since so long ago: three days after its end."""


@asynccontextmanager
async def under_tls(model: Path, prefill: TlsFiles, decode: TlsFiles | None) -> AsyncIterator[Pair]:
    """Yield two workers with certificates of their own."""
    engine = engine_options(model, shield="seal")
    one = Worker("prefill", engine, msgspec.structs.replace(QUICK, tls=prefill))
    other = Worker("decode", engine, msgspec.structs.replace(QUICK, tls=decode))
    client = SplitClient(one.start(), other.start(), least_tokens=64, patience_s=20.0)
    try:
        await client.info()
        await client.set_tenants({"a": 0.5})
        yield Pair(one, other, client)
    finally:
        await client.close()


async def test_pages_pass_under_tls(tiny: dict[str, Path], tmp_path: Path) -> None:
    authority = Authority(tmp_path / "cluster")
    wanted = tokens(drive(core_for(tiny["qwen2"], chunk_tokens=128), [request(PROMPT, SOME)])["r"])
    files = [authority.worker(name) for name in ("prefill", "decode")]
    async with under_tls(tiny["qwen2"], *files) as pair:
        (got,) = await answers(pair.client, request(PROMPT, SOME))
        assert tokens(got) == wanted
        assert pair.receives.installed_pages == len(PROMPT) // 64
        assert [outlet.stats.name for outlet in pair.sends.outlets] == ["tls over tcp"]
        assert not pair.faults()
        await pair.quiet()


@pytest.mark.parametrize("stranger", ["another authority's", "none"])
async def test_a_stranger_gets_no_page_and_is_told_where_to_look(
    tiny: dict[str, Path], tmp_path: Path, stranger: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = Authority(tmp_path / "cluster").worker("prefill")
    foreign = Authority(tmp_path / "other").worker("decode")
    async with under_tls(tiny["qwen2"], files, None if stranger == "none" else foreign) as pair:
        (got,) = await answers(pair.client, request(PROMPT, SOME))
        assert len(tokens(got)) == SOME.max_tokens, "it computes the prompt itself"
        assert pair.receives.installed_pages == 0
        assert not pair.sends.outlets
        assert pair.decode.side.faults.counts["a link ended"]
        await pair.quiet()
    if stranger != "none":
        assert "look at cluster_certificate and cluster_authority of both workers" in caplog.text


@asynccontextmanager
async def listening(tls: TlsFiles | None) -> AsyncIterator[tuple[str, list[Channel]]]:
    """Yield the address of a listener, and what has reached it."""
    reached: list[Channel] = []
    leave = asyncio.Event()

    async def accepted(channel: Channel) -> None:
        reached.append(channel)
        await leave.wait()

    server = TcpConnector(LinkOptions(tls=tls, dial_s=2.0))
    address = await server.listen("tcp://127.0.0.1:0", accepted)
    try:
        yield address, reached
    finally:
        leave.set()
        for channel in reached:
            channel.close()
        server.close()
        await asyncio.sleep(0.01)


async def heard(address: str, context: ssl.SSLContext | None) -> bytes:
    """Connect as anybody can, say something that is no frame, and return what comes."""
    host, port = host_port(address)
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError:
        return b""
    try:
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(20):
            return await reader.read()
    except OSError:
        return b""
    finally:
        writer.transport.abort()


def loose(files: TlsFiles | None) -> ssl.SSLContext:
    """Return a context that checks nothing of its own: a program of somebody else's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)
    return context


def of_another(folder: Path, _: Authority) -> ssl.SSLContext:
    return loose(Authority(folder / "other").worker("decode"))


def expired(_: Path, authority: Authority) -> ssl.SSLContext:
    return loose(authority.worker("decode", since=OVER))


def without(_: Path, __: Authority) -> ssl.SSLContext:
    return loose(None)


def plain(_: Path, __: Authority) -> None:
    return None


@pytest.mark.parametrize("stranger", [of_another, expired, without, plain])
async def test_strangers_end_before_anything_is_said_and_the_next_worker_joins(
    tmp_path: Path,
    stranger: Callable[[Path, Authority], ssl.SSLContext | None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    authority = Authority(tmp_path / "cluster")
    async with listening(authority.worker("prefill")) as (address, reached):
        said = await heard(address, stranger(tmp_path, authority))
        assert len(said) < 64, "an alert at most"
        assert not reached
        welcome = TcpConnector(LinkOptions(tls=authority.worker("decode"), dial_s=20.0))
        channel = await welcome.dial(address)
        await channel.send((control_bytes(Beat()),))
        await until(lambda: len(reached) == 1)
        assert isinstance((await reached[0].receive()).control(), Beat)
        channel.close()
    assert "Traceback" not in caplog.text


async def test_a_listener_that_is_none_of_the_clusters_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "cluster")
    own = TcpConnector(LinkOptions(tls=authority.worker("decode"), dial_s=20.0))
    async with listening(Authority(tmp_path / "other").worker("prefill")) as (address, _):
        with pytest.raises(LinkLost, match=r"other worker's certificate is refused .*look at clus"):
            await own.dial(address)
    async with listening(None) as (address, reached):
        dialling = asyncio.ensure_future(own.dial(address))
        await until(lambda: len(reached) == 1)
        await reached[0].send((control_bytes(Beat()),))
        with pytest.raises(LinkLost, match=r"speaks no TLS; look at cluster_certificate"):
            await dialling


def test_a_certificate_whose_time_is_over_or_has_not_come_is_refused_at_start(
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path / "cluster")
    for name, since in (("over", OVER), ("early", -DAY)):
        files = authority.worker(name, since=since)
        with pytest.raises(ConfigError, match=rf"cluster_certificate: .*{name}.pem holds from 20"):
            context_of(files, server=True)


def test_files_that_are_none_are_named_by_their_setting(tmp_path: Path) -> None:
    files = Authority(tmp_path / "cluster").worker("one")
    (empty := tmp_path / "empty").touch()
    for changes, why in (
        ({"certificate": str(empty)}, "cluster_certificate: .*empty"),
        ({"key": str(tmp_path / "none")}, "cluster_key .*none can't be used: No such file"),
        ({"authority": str(empty)}, "cluster_authority: .*empty can't be used"),
    ):
        with pytest.raises(ConfigError, match=why):
            context_of(msgspec.structs.replace(files, **changes), server=False)


def test_what_is_not_for_tls_is_not_blamed_on_certificates() -> None:
    assert refusal(ConnectionResetError()) is None
    alert = ssl.SSLError(1, "x")
    alert.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    assert "refused by the other (certificate required)" in (refusal(alert) or "")
