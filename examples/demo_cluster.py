"""A cluster on this machine: a trace runs, a worker is killed in the middle, nobody is let down.

Prompts and answers have the lengths of a published trace, an eighth of them, and come as a Poisson
process does. One engine answers all first. Then two workers compute prompts and two answer, as Ray
actors behind one server. Half-way through, the answering worker that is busiest is killed; its
requests go on elsewhere and it comes back. An answer is right where it is the one engine's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
from openai import APIError, OpenAI

from examples.demo import Served, handbook, server
from kvkeep.cli.console import OUT, make_table
from kvkeep.config import DEMO_MODEL
from kvkeep.models.text import TextModel
from kvkeep.server.tenants import TenantFile
from kvkeep.sim.load import TRACES, Load, draw

TENANTS: Final = ("harbour", "library")
BOOKS: Final = 6
"""A prompt begins with one of so many."""
AT_A_TIME: Final = 16
SCALE: Final = 1 / 8
MOST_TOKENS: Final = 4000
"""The demo model has room for 4,096."""
BACK_S: Final = 120.0
"""What the killed worker gets to come back."""


class Asked(NamedTuple):
    """One request of the trace."""

    at_s: float
    """After the first one of its third."""
    tenant: str
    prompt: list[int]
    answer_tokens: int


class Done(NamedTuple):
    """One request, as its client saw it."""

    begun_s: float
    ended_s: float
    answer: str
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
        end = time.monotonic() + BACK_S
        while time.monotonic() < end:
            answering = [one for one in self.workers().values() if one["role"] == "decode"]
            worker = max(answering, key=lambda one: int(one["streams"]))
            if worker["streams"]:
                os.kill(worker["pid"], signal.SIGKILL)
                return str(worker["name"])
            time.sleep(0.01)
        raise SystemExit("no worker had anything to answer")

    def wait_until_back(self, name: str) -> None:
        """Wait until a killed worker serves again."""
        end = time.monotonic() + BACK_S
        while (worker := self.workers()[name])["state"] != "serving" or worker["starts"] < 2:
            if time.monotonic() > end:
                raise SystemExit(f"{name} is not back after {BACK_S:.0f} s")
            time.sleep(0.1)


def requests_of(trace: str, count: int, rate: float, seed: int) -> list[Asked]:
    """Return what is asked, in its order: handbooks, cut to the trace's lengths."""
    text, chance = TextModel.load(DEMO_MODEL), random.Random(seed)
    books = [text.encode(handbook(seed + i)[0]) for i in range(BOOKS)]
    drawn = draw(Load(trace, count, rate, seed=seed, scale=SCALE, most_tokens=MOST_TOKENS))
    found: list[Asked] = []
    third = max(1, count // 3)
    for at, (at_s, length, answer) in enumerate(zip(*drawn, strict=True)):
        first = chance.randrange(BOOKS)
        pages = itertools.chain.from_iterable(books[(first + i) % BOOKS] for i in range(64))
        prompt = list(itertools.islice(pages, int(length)))
        begun_s = float(drawn.at_s[at // third * third])
        found.append(Asked(float(at_s) - begun_s, chance.choice(TENANTS), prompt, int(answer)))
    return found


def one(url: str, keys: dict[str, str], asked: Asked, begin_s: float = 0.0) -> Done:
    """Send one request at its time; errors are told, not raised."""
    time.sleep(max(0.0, begin_s + asked.at_s - time.monotonic()))
    begun = time.monotonic()
    error, answer = "", ""
    try:
        with OpenAI(
            base_url=f"{url}/v1", api_key=keys[asked.tenant], max_retries=0, timeout=120
        ) as client:
            told = client.completions.create(
                model=client.models.list().data[0].id,
                prompt=asked.prompt,
                max_tokens=asked.answer_tokens,
                temperature=0.0,
                extra_body={"ignore_eos": True},
            )
            answer = told.choices[0].text
    except APIError as refused:
        error = type(refused).__name__
    return Done(begun, time.monotonic(), answer, error)


def run(url: str, operator: Operator, keys: dict[str, str], asked: Sequence[Asked]) -> Trace:
    """Run a third of the trace, kill a worker in the second, and the last one once it is back."""
    futures: list[Future[Done]] = []
    third = len(asked) // 3

    def send(some: Sequence[Asked]) -> None:
        now = time.monotonic()
        futures.extend(pool.submit(one, url, keys, request, now) for request in some)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        send(asked[:third])
        wait(futures)
        send(asked[third : 2 * third])
        killed = operator.kill_the_busiest()
        killed_s = time.monotonic()
        OUT.print(f"{killed} was killed in the middle of an answer.")
        wait(futures)
        operator.wait_until_back(killed)
        back_s = time.monotonic()
        OUT.print(f"{killed} is back after {back_s - killed_s:.1f} s.\n")
        send(asked[2 * third :])
        wait(futures)
    return Trace([future.result() for future in futures], killed, killed_s, back_s)


def report(trace: Trace, wanted: Sequence[str]) -> bool:
    """Print the table; return whether every answer was the one engine's."""
    pairs = list(zip(trace.done, wanted, strict=True))
    parts = {
        "before": [pair for pair in pairs if pair[0].ended_s < trace.killed_s],
        "while it was gone": [
            pair
            for pair in pairs
            if pair[0].ended_s >= trace.killed_s and pair[0].begun_s < trace.back_s
        ],
        "after it was back": [pair for pair in pairs if pair[0].begun_s >= trace.back_s],
    }
    rows = [(name, *_row(part)) for name, part in parts.items()]
    OUT.print(make_table(("part", "requests", "right", "errors", "mean", "longest"), rows))
    right = sum(done.answer == answer for done, answer in pairs)
    OUT.print(f"{right} of {len(pairs)} answers are right; {trace.killed} was killed once.")
    return right == len(pairs)


def _row(part: Sequence[tuple[Done, str]]) -> tuple[object, ...]:
    times = [done.latency_s for done, _ in part]
    shown = (f"{sum(times) / len(times):.2f} s", f"{max(times):.2f} s") if times else ("-", "-")
    right = sum(done.answer == answer for done, answer in part)
    return len(part), right, sum(bool(done.error) for done, _ in part), *shown


def main() -> int:
    """Run the demo; return 0 where every answer was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=36)
    parser.add_argument("--trace", choices=[*TRACES], default="mooncake_conv")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvkeep-cluster-") as folder:
        file = TenantFile(Path(folder) / "keys.json")
        keys = {name: file.add(name, share=1 / len(TENANTS)).text for name in TENANTS}
        token = Path(folder) / "admin"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        plain = ["--kv-cache-memory-bytes", "512MiB", "--admin-token-file", str(token)]
        flags = ["--cluster", "auto", "--cluster-prefill", "2", "--cluster-decode", "2"]
        flags += ["--cluster-least-tokens", "256", "--cluster-epoch-s", "1"]
        asked = requests_of(given.trace, given.requests, given.rate, given.seed)
        OUT.print("Starting one engine, to know the answers ...")
        with server(file.path, str(DEMO_MODEL), *plain) as served:
            wanted = [one(served.url, keys, request).answer for request in asked]
        OUT.print("Starting a head, two prefill and two decode workers on Ray ...")
        with server(file.path, str(DEMO_MODEL), *plain, *flags) as served:
            tokens = sum(len(request.prompt) for request in asked)
            told = f"{len(asked)} requests of {tokens} tokens, with {given.trace}'s lengths / 8"
            OUT.print(f"{served.url}: {told}.")
            operator = Operator(served, token.read_text(encoding="ascii"))
            trace = run(served.url, operator, keys, asked)
    return 0 if report(trace, wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
