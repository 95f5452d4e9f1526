"""Another engine in the policies' place: vLLM's server on the same trace, under the same audits.

Its pool has as many bytes as ours. As it comes (`vllm`) its prefix cache is one for all;
`vllm_salted` sends a `cache_salt` with every request, one for each key, as a gateway would.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import httpx
import msgspec

from bench import peers, sharing_trace
from bench.harness import Cell, Estimate, Figure, Options, Report, Row
from bench.sharing_attack import (
    APART,
    AUDIT_PAGES,
    AUDITED,
    IMPATIENT_S,
    SEEDS,
    attack_figures,
    attack_rows,
    attacked,
)
from bench.sharing_replay import Player, Replay, played_params, policy_row, replay, tenant_name
from bench.sharing_server import page_bytes
from bench.sharing_target import Counted, total
from bench.sharing_trace import Ask, Shape, Texts
from kvkeep.audit import Report as AuditReport
from kvkeep.cli.console import NOTES
from kvkeep.config import DEMO_MODEL
from kvkeep.errors import ConfigError
from kvkeep.models.text import TextModel
from tools.peers import vllm

PEER: Final = "vllm"
WAYS: Final = ("vllm", "vllm_salted")
PARTS: Final = ("replay", "audit")
MODEL: Final = "demo"
MAX_TOKENS: Final = 4096
SALTED_S: Final = 1200.0
"""One seed, and a third of the time that our own promises are given: a peer's have no goal."""


class Salting(httpx.AsyncBaseTransport):
    """Adds to each request the salt of its key; what a client says itself does not count."""

    def __init__(self, inner: httpx.AsyncBaseTransport, salts: Mapping[str, str]) -> None:
        self._inner = inner
        self._salts = {f"Bearer {key}": salt for key, salt in salts.items()}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the salted request on."""
        if request.method == "POST":
            body = msgspec.json.decode(await request.aread(), type=dict[str, msgspec.Raw])
            salt = self._salts.get(request.headers.get("Authorization", ""))
            if salt is None:
                return httpx.Response(httpx.codes.UNAUTHORIZED)
            body["cache_salt"] = msgspec.Raw(msgspec.json.encode(salt))
            headers = {k: v for k, v in request.headers.items() if k != "content-length"}
            request = httpx.Request(
                request.method,
                request.url,
                headers=headers,
                content=msgspec.json.encode(body),
                extensions=request.extensions,
            )
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """Close what it sends with."""
        await self._inner.aclose()


class Engine(NamedTuple):
    """What results call a peer."""

    name: str
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Vllm:
    """A vLLM server; keys are names that it does not ask for."""

    url: str
    tenants: tuple[str, ...]
    salted: bool

    @property
    def keys(self) -> Mapping[str, str]:
        """Return each tenant's key."""
        return {name: f"key of {name}" for name in self.tenants}

    def transport(self) -> httpx.AsyncBaseTransport:
        """Return a connection, salted where that is what is measured."""
        plain = httpx.AsyncHTTPTransport()
        salts = {key: f"salt of {name}" for name, key in self.keys.items()}
        return Salting(plain, salts) if self.salted else plain

    def counted(self) -> Counted:
        """Read its metrics."""
        page = self.page()
        found, asked = (total(page, f"vllm:prefix_cache_{what}") for what in ("hits", "queries"))
        return Counted(found, asked)

    def page(self) -> str:
        """Return its page of metrics."""
        return httpx.get(f"{self.url}/metrics", timeout=20).text

    def engine(self) -> Engine:
        """Return what it says it is."""
        version = httpx.get(f"{self.url}/version", timeout=20).json()["version"]
        return Engine(f"{PEER} {version}", block_tokens(self.page()))


def block_tokens(page: str) -> int:
    """Return how many tokens are shared at a time, from a page of metrics."""
    found = re.search(r'^vllm:cache_config_info{.*block_size="(\d+)"', page, re.MULTILINE)
    if found is None:
        raise RuntimeError("the metrics page has no vllm:cache_config_info")
    return int(found[1])


@contextmanager
def running(
    tenants: Sequence[str], pages: int, options: Options, *, salted: bool
) -> Iterator[Vllm]:
    """Serve the demo model with the memory of so many of our pages."""
    told = ["--served-model-name", MODEL, "--max-model-len", str(MAX_TOKENS)]
    told += ["--kv-cache-memory-bytes", str(pages * page_bytes(DEMO_MODEL))]
    told += vllm.EAGER if options.quick else ()
    with TemporaryDirectory() as folder:
        log = Path(folder) / "serve.log"
        with log.open("wb") as stream:
            python = str(peers.python_of(PEER))
            try:
                server = vllm.start(python, DEMO_MODEL, options.threads, *told, log=stream)
            except (RuntimeError, TimeoutError) as error:
                raise ConfigError(f"peer: {PEER}: {error}:\n{tail(log)}") from None
            try:
                yield Vllm(server.url, tuple(tenants), salted)
            finally:
                server.close()


def tail(log: Path) -> str:
    """Return the end of a log."""
    return log.read_text(encoding="utf-8", errors="replace")[-4000:]


class Tried(NamedTuple):
    """What one way of running the peer cost and told."""

    engine: Engine
    played: Replay | None
    reports: list[AuditReport]


@dataclass(frozen=True, slots=True)
class Bench:
    """The trace, and what is asked."""

    trace: Sequence[Ask]
    shape: Shape
    texts: Texts
    parts: Sequence[str]
    options: Options

    def attempt(self, way: str) -> Tried:
        """Play the trace, then attack: a server each."""
        salted = way != PEER
        played: Replay | None = None
        reports: list[AuditReport] = []
        engines: list[Engine] = []
        names = [tenant_name(n) for n in range(self.shape.tenants)]
        pages = sharing_trace.pool_pages(self.trace, self.shape)
        if "replay" in self.parts:
            with running(names, pages, self.options, salted=salted) as server:
                engines.append(server.engine())
                played = replay(Player(server, self.texts, self.shape, MODEL), self.trace, 0.0)
        if "audit" in self.parts:
            with running([*AUDITED], AUDIT_PAGES, self.options, salted=salted) as server:
                engines.append(server.engine())
                reports.append(self._attack(server, way))
        return Tried(engines[-1], played, reports)

    def _attack(self, server: Vllm, way: str) -> AuditReport:
        quick = self.options.quick
        seconds = SALTED_S if way in APART else IMPATIENT_S
        report = attacked(server, SEEDS[0], settle_s=0.0, quick=quick, seconds=seconds)
        NOTES.print(f"{way}: {report.verdict} after {report.seconds:.0f} s")
        return report


def asked(options: Options) -> tuple[list[str], list[str]]:
    """Return the parts and ways to measure: all, or those that `--only` names."""
    other = sorted({*options.peers} - {PEER})
    if other:
        raise ConfigError(f"peer: {other[0]!r} is not measured here; there is: {PEER}")
    unknown = sorted({*options.only} - {*PARTS, *WAYS})
    if unknown:
        known = ", ".join((*PARTS, *WAYS))
        raise ConfigError(f"only: there is no part {unknown[0]!r} of a peer; there are: {known}")
    parts: list[str] = [part for part in PARTS if part in options.only]
    ways: list[str] = [way for way in WAYS if way in options.only]
    return parts or [*PARTS], ways or [*WAYS]


def measure(options: Options) -> Report:
    """Play the trace to the peer and attack it, each way of running it."""
    parts, ways = asked(options)
    shape = sharing_trace.QUICK if options.quick else sharing_trace.FULL
    trace = sharing_trace.make(shape) if options.quick else sharing_trace.read()
    texts = Texts(TextModel.load(DEMO_MODEL), shape)
    bench = Bench(trace, shape, texts, parts, options)
    rows: list[Row] = []
    attacks: list[Row] = []
    figures: list[Figure] = []
    params: dict[str, Cell] = {
        "model": MODEL,
        "threads": options.threads,
        "quick": options.quick,
        "parts": ", ".join(parts),
        **played_params(trace, shape),
    }
    for way in ways:
        tried = bench.attempt(way)
        params["peer"] = f"{tried.engine.name}, blocks of {tried.engine.block_tokens} tokens"
        found = attack_figures(way, tried.reports)
        worst: Estimate | None = found[0].estimate if found else None
        figures += found
        attacks += attack_rows(tried.engine.name, way, tried.reports)
        if tried.played is not None:
            rows.append(policy_row(tried.engine.name, MODEL, way, tried.played, worst))
    return Report("sharing", params, figures, [*rows, *attacks])
