"""A cluster on this machine: requests run, a worker is killed in the middle, nobody is let down.

Two workers compute prompts and two answer, as Ray actors behind one server. Half-way through, the
answering worker that is busiest is killed; its requests go on elsewhere and it comes back.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
from openai import APIError, OpenAI

from examples.demo import Served, ask, handbook, server
from kvkeep.cli.console import OUT, make_table
from kvkeep.config import DEMO_MODEL
from kvkeep.server.tenants import TenantFile

TENANTS: Final = ("harbour", "library")
BOOKS: Final = 6
AT_A_TIME: Final = 3
BACK_S: Final = 120.0
"""What the killed worker gets to come back."""


class Done(NamedTuple):
    """One request, as its client saw it."""

    begun_s: float
    ended_s: float
    right: bool
    error: str

    @property
    def latency_s(self) -> float:
        """Return what its client waited."""
        return self.ended_s - self.begun_s


class Trace(NamedTuple):
    """What was asked, and when the worker died and was back."""

    done: list[Done]
    killed: str
    killed_s: float
    back_s: float


class Operator:
    """Who looks at the admin port."""

    def __init__(self, served: Served, token: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=served.admin_url, headers=headers, timeout=30)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return the workers, by name."""
        engine = self._client.get("/ready").json()["engine"]
        return {worker["name"]: worker for worker in engine["workers"]}

    def kill_the_busiest(self) -> str:
        """Kill the answering worker with the most requests, once there is one; return its name."""
        while True:
            answering = [one for one in self.workers().values() if one["role"] == "decode"]
            worker = max(answering, key=lambda one: int(one["streams"]))
            if worker["streams"]:
                os.kill(worker["pid"], signal.SIGKILL)
                return str(worker["name"])
            time.sleep(0.01)

    def wait_until_back(self, name: str) -> None:
        """Wait until a killed worker serves again."""
        end = time.monotonic() + BACK_S
        while (worker := self.workers()[name])["state"] != "serving" or worker["starts"] < 2:
            if time.monotonic() > end:
                raise SystemExit(f"{name} is not back after {BACK_S:.0f} s")
            time.sleep(0.1)


def one(url: str, key: str, tenant: str, book: str, place: str, code: str) -> Done:
    """Ask one question; errors are told, not raised."""
    begun = time.monotonic()
    error, right = "", False
    try:
        with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) as client:
            right = ask(client, tenant, book, place, code).answer == code
    except APIError as refused:
        error = type(refused).__name__
    return Done(begun, time.monotonic(), right, error)


def run(url: str, operator: Operator, keys: dict[str, str], count: int, seed: int) -> Trace:
    """Run a third of the trace, kill a worker in the second, and the last one once it is back."""
    chance = random.Random(seed)
    books = [handbook(seed + i) for i in range(BOOKS)]
    futures: list[Future[Done]] = []
    with ThreadPoolExecutor(AT_A_TIME) as pool:

        def send(number: int) -> None:
            for _ in range(number):
                tenant = chance.choice(TENANTS)
                book, codes = chance.choice(books)
                place = chance.choice(list(codes))
                futures.append(
                    pool.submit(one, url, keys[tenant], tenant, book, place, codes[place])
                )

        def settle() -> None:
            for future in futures:
                future.result()

        send(count // 3)
        settle()
        send(count // 3)
        killed = operator.kill_the_busiest()
        killed_s = time.monotonic()
        OUT.print(f"{killed} was killed in the middle of an answer.")
        settle()
        operator.wait_until_back(killed)
        back_s = time.monotonic()
        OUT.print(f"{killed} is back after {back_s - killed_s:.1f} s.\n")
        send(count - 2 * (count // 3))
        settle()
    return Trace([future.result() for future in futures], killed, killed_s, back_s)


def report(trace: Trace) -> bool:
    """Print the table; return whether every answer was right."""
    parts = {
        "before": [one for one in trace.done if one.ended_s < trace.killed_s],
        "while it was gone": [
            one
            for one in trace.done
            if one.ended_s >= trace.killed_s and one.begun_s < trace.back_s
        ],
        "after it was back": [one for one in trace.done if one.begun_s >= trace.back_s],
    }
    rows = [(name, *_row(done)) for name, done in parts.items()]
    OUT.print(make_table(("part", "requests", "right", "errors", "mean", "longest"), rows))
    right = sum(one.right for one in trace.done)
    OUT.print(f"{right} of {len(trace.done)} answers are right; {trace.killed} was killed once.")
    return right == len(trace.done)


def _row(done: Sequence[Done]) -> tuple[object, ...]:
    times = [one.latency_s for one in done]
    shown = (f"{sum(times) / len(times):.2f} s", f"{max(times):.2f} s") if times else ("-", "-")
    right, errors = sum(one.right for one in done), sum(bool(one.error) for one in done)
    return len(done), right, errors, *shown


def main() -> int:
    """Run the demo; return 0 where every answer was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=36)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvkeep-cluster-") as folder:
        file = TenantFile(Path(folder) / "keys.json")
        keys = {name: file.add(name, share=1 / len(TENANTS)).text for name in TENANTS}
        token = Path(folder) / "admin"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        flags = ["--cluster", "auto", "--cluster-prefill", "2", "--cluster-decode", "2"]
        flags += ["--cluster-least-tokens", "256", "--cluster-epoch-s", "1"]
        flags += ["--kv-cache-memory-bytes", "512MiB", "--admin-token-file", str(token)]
        OUT.print("Starting a head, two prefill and two decode workers on Ray ...")
        with server(file.path, str(DEMO_MODEL), *flags) as served:
            OUT.print(f"{served.url}: {given.requests} questions about {BOOKS} handbooks.")
            operator = Operator(served, token.read_text(encoding="ascii"))
            trace = run(served.url, operator, keys, given.requests, given.seed)
    return 0 if report(trace) else 1


if __name__ == "__main__":
    sys.exit(main())
