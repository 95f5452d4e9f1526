"""A real `kvkeep serve` in a process of its own, on free loopback ports, with tenants' keys."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import msgspec

from kvkeep.server.tenants import SharingTerms, TenantFile

ADMIN_TOKEN: Final = "admin-token-for-tests"
START_TIMEOUT_S: Final = 110.0
STOP_TIMEOUT_S: Final = 40.0


class Gauges(msgspec.Struct, frozen=True):
    """The engine's part of `/ready`, as far as tests look at it."""

    requests_running: int
    requests_waiting: int
    pages_total: int
    pages_used: int
    pages_free: int
    prompt_tokens_total: int
    generation_tokens_total: int
    finished: list[tuple[str, int]]


class Ready(msgspec.Struct, frozen=True):
    """What the admin port's `/ready` answers, as far as tests look at it."""

    status: str
    in_flight: int
    accounts: int
    engine: Gauges


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and how to reach it."""

    process: subprocess.Popen[bytes]
    log: Path
    """Its stderr."""
    url: str
    admin_url: str
    keys: Mapping[str, str]
    """Each tenant's API key."""

    def admin(self, path: str, token: str = ADMIN_TOKEN) -> httpx.Response:
        """Return the admin port's answer."""
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.get(self.admin_url + path, headers=headers, timeout=20, verify=False)

    def ready(self) -> Ready:
        """Return the details of `/ready`."""
        return msgspec.json.decode(self.admin("/ready").content, type=Ready)

    def tree(self) -> list[int]:
        """Return the process ids of the server and all below it."""
        found, parents = [self.process.pid], [self.process.pid]
        while parents:
            task = Path(f"/proc/{parents.pop()}/task")
            below = [int(w) for t in task.glob("*/children") for w in t.read_text().split()]
            found += below
            parents += below
        return found

    def rss_bytes(self) -> int:
        """Return the resident memory of the whole tree."""
        statuses = (Path(f"/proc/{pid}/status").read_text() for pid in self.tree())
        sizes = (re.search(r"VmRSS:\s+(\d+) kB", status) for status in statuses)
        return sum(int(size[1]) << 10 for size in sizes if size)


@contextmanager
def serving(
    folder: Path,
    tenants: Mapping[str, float],
    *arguments: str,
    concurrency: int = 64,
    group: str | None = None,
    command: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve the demo model, or what `arguments` say, to tenants of these shares.

    All are of one `group`; `command` goes before the interpreter. Raises `RuntimeError` with the
    log where the server ends before it is ready.
    """
    file, terms = TenantFile(folder / "keys.json"), SharingTerms(group=group)
    keys = {
        name: file.add(name, share=share, concurrency=concurrency, sharing=terms).text
        for name, share in tenants.items()
    }
    with started(file, keys, *arguments, command=command) as server:
        yield server


@contextmanager
def started(
    file: TenantFile, keys: Mapping[str, str], *arguments: str, command: Sequence[str] = ()
) -> Iterator[Server]:
    """Serve those of a tenant file, whose keys are known; what else is kept stands beside it."""
    folder = file.path.parent
    token, log = folder / "token", folder / "serve.log"
    token.write_text(ADMIN_TOKEN)
    token.chmod(0o600)
    ports = ["--port", "0", "--admin-port", "0", "--admin-token-file", str(token)]
    run = [*command, sys.executable, "-m", "kvkeep", "serve", "--keys", str(file.path), *ports]
    with log.open("wb") as stream:
        process = subprocess.Popen([*run, *arguments], stderr=stream, cwd=folder)
    try:
        url, admin_url = _wait(process, log)
        yield Server(process, log, url, admin_url, keys)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """Return the public and the admin URL the server announces."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        text = log.read_text(encoding="utf-8")
        public = re.search(r"API\s+(http://\S+)/v1\n", text)
        admin = re.search(r"admin\s+(http://\S+) ", text)
        if public and admin and "Ready." in text:
            return public[1], admin[1]
        time.sleep(0.05)
    raise RuntimeError(f"the server is not ready:\n{log.read_text(encoding='utf-8')}")
