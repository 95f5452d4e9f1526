"""What one tenant's storm does to another's time to first token, through a real server.

Two tenants of equal shares. One is timed: a fresh prompt at a time, at random moments. The other is
either fair (long prompts at half the rate the server can read them, evenly spread) or storms (64
long prompts under way at all times, a new one as soon as another ends). Windows of the two kinds
alternate; what the server read during a storm sets the rate of the fair window beside it.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from bench import harness, load
from bench.harness import Cell, Figure, Goal, Options, Report, Row, estimate
from bench.load import Neighbour
from tests.servers import Server, serving

TIMED: Final = "timed"
OTHER: Final = "other"
PROMPT: Final = 512
ANSWER: Final = 4
PAUSE_S: Final = 0.05
"""Mean time between an answer and the timed tenant's next prompt."""
LONG_PROMPT: Final = 2048
LONG_ANSWER: Final = 16
STORM: Final = Neighbour(LONG_PROMPT, LONG_ANSWER, clients=64)
FAIR_CLIENTS: Final = 16
SETTLE_S: Final = 1.0


class Window(NamedTuple):
    """What was seen in one window."""

    kind: str
    ttft_s: tuple[float, ...]
    read_per_second: float
    """Prompt tokens of both tenants."""

    def p(self, percent: float) -> float:
        """Return a percentile of the time to first token, in seconds."""
        return float(np.percentile(self.ttft_s, percent))


@dataclass(slots=True)
class Bench:
    """A server and the windows taken of it."""

    server: Server
    requests: int
    """Of a window: the same number in each, a percentile's bias depends on it."""
    taken: int = 0

    def window(self, kind: str, neighbour: Neighbour | None) -> Window:
        """Time the one tenant for a while, beside the other where there is one."""
        self.taken += 1
        self._settle()
        if neighbour is None:
            return self._time(kind)
        with load.beside(self.server.url, self.server.keys[OTHER], neighbour, seed=self.taken):
            time.sleep(SETTLE_S)
            return self._time(kind)

    def _time(self, kind: str) -> Window:
        chance = random.Random(self.taken)
        before, begun, found = self._read_tokens(), time.monotonic(), []
        with load.client(self.server.url, self.server.keys[TIMED]) as opened:
            for _ in range(self.requests):
                text = load.prompt(chance, PROMPT)
                found.append(load.first_token_s(opened, text, ANSWER))
                time.sleep(chance.expovariate(1 / PAUSE_S))
        read, took = self._read_tokens() - before, time.monotonic() - begun
        return Window(kind, tuple(found), read / took)

    def _read_tokens(self) -> int:
        return self.server.ready().engine.prompt_tokens_total

    def _settle(self) -> None:
        """Wait until what the last neighbour left behind is gone."""
        while self.server.ready().in_flight:
            time.sleep(0.05)


def fair(storm: Window) -> Neighbour:
    """Return a neighbour that asks for half of what the server read in a storm."""
    rate = storm.read_per_second / 2 / LONG_PROMPT
    return Neighbour(LONG_PROMPT, LONG_ANSWER, clients=FAIR_CLIENTS, per_second=rate)


def pairs(bench: Bench, count: int) -> list[tuple[Window, Window]]:
    """Take (fair, storm) windows, the first of a pair alternating."""
    last = bench.window("storm", STORM)
    found = []
    for index in range(count):
        if index % 2:
            last = bench.window("storm", STORM)
            found.append((bench.window("fair", fair(last)), last))
        else:
            calm = bench.window("fair", fair(last))
            last = bench.window("storm", STORM)
            found.append((calm, last))
    return found


def row(window: Window) -> Row:
    """Return a window as a row of the report."""
    return {
        "neighbour": window.kind,
        "requests": len(window.ttft_s),
        "median_ms": window.p(50) * 1e3,
        "p90_ms": window.p(90) * 1e3,
        "p99_ms": window.p(99) * 1e3,
        "read_tokens_per_s": window.read_per_second,
    }


def together(kind: str, windows: list[Window]) -> Window:
    """Return several windows as one."""
    rate = float(np.mean([window.read_per_second for window in windows]))
    return Window(kind, tuple(t for window in windows for t in window.ttft_s), rate)


def ratios(taken: list[tuple[Window, Window]], percent: float) -> harness.Estimate:
    """Return storm over fair, pair by pair, of a percentile of the time to first token."""
    return estimate([storm.p(percent) / calm.p(percent) for calm, storm in taken])


def measure(options: Options) -> Report:
    """Run all windows against one server of the demo model."""
    count, requests = (2, 50) if options.quick else (harness.MIN_PAIRS, 150)
    arguments = ("--threads", str(options.threads), "--kv-cache-memory-bytes", "768MiB")
    shares = {TIMED: 0.5, OTHER: 0.5}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), shares, *arguments, concurrency=2 * STORM.clients) as server,
    ):
        bench = Bench(server, requests)
        alone = bench.window("none", None)
        taken = pairs(bench, count)
    figures = [
        Figure("storm_p99_ttft_ratio", ratios(taken, 99), Goal("<=", 1.2)),
        Figure("storm_median_ttft_ratio", ratios(taken, 50)),
    ]
    params: dict[str, Cell] = {
        "model": "demo",
        "threads": options.threads,
        "quick": options.quick,
        "shares": "0.5/0.5",
        "timed_prompt_tokens": PROMPT,
        "storm": f"{STORM.clients} prompts of {LONG_PROMPT} tokens at all times",
        "fair": f"prompts of {LONG_PROMPT} tokens at half the rate read in the storm",
        "requests_per_window": requests,
    }
    windows = [alone, *(window for pair in taken for window in pair)]
    windows += [together("fair, all", [p[0] for p in taken])]
    windows += [together("storm, all", [p[1] for p in taken])]
    return Report("storm", params, figures, [row(window) for window in windows])


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("storm", arguments, measure)
