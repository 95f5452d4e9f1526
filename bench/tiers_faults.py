"""Answers of a server whose disk tier fails in every way, beside those of one without tiers.

A server with a sealed disk tier (`bench.faulty_server`) answers, is killed in the middle, bytes of
its segments are changed, and it is started again; each answer it gave is compared with the answer
of a server that has no tiers. Runs that ended are kept in `build/tier-faults`, by commit, so that a
benchmark of a quarter of an hour can be made in pieces.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import httpx

from bench.faulty_server import ADMIN
from bench.kept import BUILD, Kept
from kvkeep.cli.console import NOTES
from kvkeep.config import DEMO_MODEL
from kvkeep.server.tenants import SharingTerms, TenantFile

TENANTS: Final = {"harbour": 0.3, "library": 0.3, "market": 0.3}
RUNS: Final = 3
"""Each of other seeds, over a directory of its own."""
TURNS: Final = 3
"""Of a run; the last one is not killed, so that its figures can be read."""
QUESTIONS: Final = 24
FLIPS: Final = 12
"""Bytes changed in the segments between two turns."""
ANSWER_TOKENS: Final = 16
_TIMEOUT_S: Final = 120.0

Messages = list[dict[str, Any]]


class Counted(NamedTuple):
    """What one fault run gave."""

    answers: int
    wrong: int
    hits: int
    misses: int
    errors: int
    kills: int


KEPT: Final = Kept(Counted, BUILD / "tier-faults")


@dataclass(frozen=True)
class Serving:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    admin_url: str

    def metric(self, name: str) -> int:
        """Return a counter's sum."""
        page = httpx.get(
            f"{self.admin_url}/metrics", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=20
        )
        found = re.findall(rf"^kvkeep:{name}(?:_total)?{{.*}} (\S+)$", page.text, re.MULTILINE)
        return int(sum(map(float, found)))

    def kill(self) -> None:
        """End it at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(folder: Path, seed: int, *more: str) -> Iterator[Serving]:
    """Start a server over a folder; it is killed at the end."""
    command = [sys.executable, "-m", "bench.faulty_server", str(folder), str(seed), *more]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line:
            raise RuntimeError(f"the server did not start: {(folder / 'log').read_text()[-2000:]}")
        yield Serving(process, *line.split())
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def conversations(count: int = QUESTIONS) -> list[Messages]:
    """Return held-out conversations up to each question."""
    lines = (DEMO_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    found: list[Messages] = []
    for messages in (json.loads(line)["messages"] for line in lines):
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        found += [messages[:turn] for turn in turns]
    return found[:count]


def answer(server: Serving, key: str, messages: Messages) -> str | None:
    """Return one answer; None where the server ended before it. What is no answer is told."""
    body = {
        "model": DEMO_MODEL.name,
        "messages": messages,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "logprobs": True,
    }
    try:
        reply = httpx.post(
            f"{server.url}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {key}"},
            timeout=_TIMEOUT_S,
        )
    except httpx.TransportError:
        return None
    if reply.status_code != httpx.codes.OK:
        return f"status {reply.status_code}: {reply.text}"
    return json.dumps(reply.json()["choices"])


def answers(
    server: Serving, key: str, asked: Sequence[Messages], killed_after: int | None = None
) -> list[str]:
    """Return a tenant's answers, as many as come before the server ends."""
    found: list[str] = []
    for messages in asked:
        said = answer(server, key, messages)
        if said is None:
            break
        found.append(said)
        if len(found) == killed_after:
            server.kill()
    return found


def turn(
    server: Serving, keys: dict[str, str], right: Sequence[str], *, killed_after: int | None
) -> Counted:
    """Let all tenants ask at a time, twice over.

    The first one's count of answers ends the server.
    """
    asked, first = 2 * conversations(), next(iter(keys))
    with ThreadPoolExecutor(len(keys)) as pool:
        running = [
            pool.submit(answers, server, key, asked, killed_after if name == first else None)
            for name, key in keys.items()
        ]
        said = [future.result() for future in running]
    wrong = sum(a != b for found in said for a, b in zip(found, [*right, *right], strict=False))
    total = sum(map(len, said))
    if killed_after is not None:
        return Counted(total, wrong, 0, 0, 0, 1)
    hits, misses, errors = map(server.metric, ("tier_hits", "tier_misses", "tier_errors"))
    return Counted(total, wrong, hits, misses, errors, 0)


def damage(folder: Path, draw: random.Random) -> None:
    """Change bytes in segments and cut one off."""
    paths = sorted((folder / "tier").glob("*.segment"))
    for path in paths:
        data = bytearray(path.read_bytes())
        for _ in range(FLIPS // len(paths) + 1):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    with draw.choice(paths).open("r+b") as last:
        last.truncate(max(0, last.seek(0, 2) - draw.randrange(1, 40_000)))


def fault_runs(runs: int, kept: Kept[Counted]) -> Counted:
    """Return what came of so many runs together; each is made once for a commit."""
    total = Counted(0, 0, 0, 0, 0, 0)
    for seed in range(runs):
        one = kept.got(f"run-{seed}", partial(fault_run, seed))
        total = Counted(*map(sum, zip(total, one, strict=True)))
    return total


def fault_run(seed: int, turns: int = TURNS) -> Counted:
    """Serve, kill, damage and start again so often; return what came of it.

    Raises `RuntimeError` where nothing failed or nothing was found, since then nothing was shown.
    """
    draw = random.Random(seed)
    with TemporaryDirectory() as name:
        folder = Path(name)
        file = TenantFile(folder / "keys.json")
        keys = {
            tenant: file.add(tenant, share=share, concurrency=8, sharing=SharingTerms()).text
            for tenant, share in TENANTS.items()
        }
        with serving(folder, seed, "plain") as plain:
            right = answers(plain, next(iter(keys.values())), conversations())
        if len(right) != QUESTIONS:
            raise RuntimeError("the server without tiers did not answer all questions")
        total = Counted(0, 0, 0, 0, 0, 0)
        for number in range(turns):
            quiet = number == turns - 1
            after = None if quiet else draw.randrange(QUESTIONS // 2, 2 * QUESTIONS)
            with serving(folder, seed * 1000 + number) as server:
                one = turn(server, keys, right, killed_after=after)
            total = Counted(*map(sum, zip(total, one, strict=True)))
            NOTES.print(
                f"faults: run {seed}, turn {number + 1} of {turns}: {one.answers} answers,"
                f" {one.wrong} wrong"
            )
            damage(folder, draw)
    if not (total.errors and total.hits and total.kills):
        raise RuntimeError(f"nothing failed, was found or was killed: {total}")
    return total
