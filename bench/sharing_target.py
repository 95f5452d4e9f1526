"""What `kvkeep bench sharing` plays its trace to and attacks: our server, or another engine's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import httpx

from kvkeep import metrics
from kvkeep.metrics import Metric
from tests.servers import Server


class Counted(NamedTuple):
    """A server's counters at one moment, or what they grew by."""

    found_tokens: float
    asked_tokens: float
    scan_s: float = 0.0
    processor_s: float = 0.0

    def since(self, earlier: Counted) -> Counted:
        """Return what was counted after an earlier moment."""
        return Counted(*(now - then for now, then in zip(self, earlier, strict=True)))

    @property
    def hit_ratio(self) -> float:
        """Return the share of prompt tokens that were in the cache."""
        return self.found_tokens / self.asked_tokens

    @property
    def scan_share(self) -> float:
        """Return the detector's share of processor time, 0 where there is no detector."""
        return self.scan_s / self.processor_s if self.scan_s else 0.0


class Target(Protocol):
    """A running server with tenants."""

    @property
    def url(self) -> str:
        """Return its root."""

    @property
    def keys(self) -> Mapping[str, str]:
        """Return each tenant's key."""

    def transport(self) -> httpx.AsyncBaseTransport:
        """Return a new connection to it, for one event loop."""

    def counted(self) -> Counted:
        """Return its counters."""


@dataclass(frozen=True, slots=True)
class Ours:
    """A `kvkeep serve`."""

    server: Server

    @property
    def url(self) -> str:
        """Return its root."""
        return self.server.url

    @property
    def keys(self) -> Mapping[str, str]:
        """Return each tenant's key."""
        return self.server.keys

    def transport(self) -> httpx.AsyncBaseTransport:
        """Return a plain connection."""
        return httpx.AsyncHTTPTransport()

    def counted(self) -> Counted:
        """Read the admin port."""
        found, asked, scan_s = map(
            self.counter, (metrics.PREFIX_HITS, metrics.PREFIX_QUERIES, metrics.SCAN_SECONDS)
        )
        return Counted(found, asked, scan_s, cpu_seconds(self.server))

    def counter(self, metric: Metric) -> float:
        """Return one counter, over all its labels."""
        return total(self.server.admin("/metrics").text, metric.full_name)


def total(page: str, name: str) -> float:
    """Return the sum of a counter on a page of metrics."""
    found = re.findall(rf"^{re.escape(name)}_total(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    if not found:
        raise RuntimeError(f"the metrics page has no {name}_total")
    return sum(map(float, found))


def cpu_seconds(server: Server) -> float:
    """Return the processor time of the server's processes."""
    stats = (Path(f"/proc/{pid}/stat").read_text() for pid in server.tree())
    fields = (stat.rpartition(")")[2].split() for stat in stats)
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")
