"""How every benchmark measures and reports: interleaved pairs, intervals, goals, one JSON shape.

A figure is the median over samples taken in one run, with its 95 % bootstrap interval. A goal is
"shown" where the whole interval reaches it, "missed" where none of it does, "not shown" where it
lies inside, or where fewer than `MIN_PAIRS` samples were taken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from rich.console import Console

from kvkeep.cli.console import NOTES, OUT, print_wide
from kvkeep.ops.cpu import available

MIN_PAIRS: Final = 10
RESAMPLES: Final = 10_000
PACKAGES: Final = ("kvkeep", "torch", "transformers", "numpy")

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]
Status = Literal["shown", "not shown", "missed"]


class Pair(NamedTuple):
    """One turn each of two things, measured next to each other."""

    ours: float
    theirs: float


class Estimate(NamedTuple):
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure shall reach."""

    direction: Literal[">=", "<="]
    value: float

    def status(self, estimate: Estimate) -> Status:
        """Return what the estimate says about this goal."""
        if estimate.samples < MIN_PAIRS:
            return "not shown"
        low, high = estimate.low, estimate.high
        if self.direction == "<=":
            low, high = -high, -low
        bound = self.value if self.direction == ">=" else -self.value
        if low >= bound:
            return "shown"
        return "missed" if high < bound else "not shown"


@dataclass(frozen=True, slots=True)
class Figure:
    """A named number of the summary."""

    name: str
    estimate: Estimate
    goal: Goal | None = None

    def row(self) -> dict[str, Cell]:
        """Return the figure as a row of the report."""
        return {
            "figure": self.name,
            "median": self.estimate.median,
            "low": self.estimate.low,
            "high": self.estimate.high,
            "samples": self.estimate.samples,
            "goal": f"{self.goal.direction} {self.goal.value:g}" if self.goal else None,
            "status": self.goal.status(self.estimate) if self.goal else None,
        }


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks of a benchmark."""

    quick: bool = False
    json: str | None = None
    """A path, or `-` for stdout; the table then goes to stderr."""
    peers: tuple[str, ...] = ()
    threads: int = 2
    only: tuple[str, ...] = ()
    """Parts to measure, where a benchmark has parts; empty: all."""
    model: str | None = None
    """Checkpoint to measure, where a benchmark takes one; None: its own."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a benchmark found."""

    name: str
    params: Mapping[str, Cell]
    figures: Sequence[Figure]
    rows: Sequence[Row] = field(default_factory=tuple)

    def document(self) -> dict[str, object]:
        """Return the JSON document: name, meta, rows, summary."""
        return {
            "name": self.name,
            "meta": meta(self.params),
            "rows": [*map(dict, self.rows), *(figure.row() for figure in self.figures)],
            "summary": {figure.name: figure.estimate.median for figure in self.figures},
        }


class Stages:
    """Says on stderr what has been done, how long that took and how long all of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = self._last = time.perf_counter()

    def done(self, what: str) -> None:
        """Say that a stage has ended."""
        now = time.perf_counter()
        took, whole = now - self._last, now - self._begun
        NOTES.print(f"{self._name}: {what}: {took:.1f} s, {whole:.0f} s in all")
        self._last = now


def interleave(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int = MIN_PAIRS
) -> list[Pair]:
    """Measure both in turn, `pairs` times, the first of a pair alternating."""
    found = []
    for index in range(pairs):
        if index % 2:
            other = theirs()
            found.append(Pair(ours(), other))
        else:
            found.append(Pair(ours(), theirs()))
    return found


def estimate(samples: Sequence[float], *, seed: int = 0) -> Estimate:
    """Return the median and its 95 % bootstrap interval (percentiles of resampled medians)."""
    values = np.asarray(samples, np.float64)
    if not values.size or not np.all(np.isfinite(values)):
        raise ValueError("an estimate needs at least one sample, all of them finite")
    picks = np.random.default_rng(seed).integers(0, values.size, (RESAMPLES, values.size))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return Estimate(float(np.median(values)), float(low), float(high), int(values.size))


def exactly(value: float, samples: int) -> Estimate:
    """Return what was counted and not estimated, over so many samples."""
    return Estimate(value, value, value, max(samples, MIN_PAIRS))


def ratio(pairs: Sequence[Pair], *, seed: int = 0) -> Estimate:
    """Return the estimate of ours over theirs, pair by pair."""
    return estimate([pair.ours / pair.theirs for pair in pairs], seed=seed)


def machine() -> dict[str, Cell]:
    """Return what the figures depend on: processor, its instructions, cores, memory, system.

    Virtual machines of one name have processors of several generations.
    """
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        model = next(named, model).partition(":")[2].strip() or model
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": model,
        "isa": available()[0],
        "cores": cores,
        "memory_bytes": memory,
        "system": platform.system(),
    }


def commit() -> str:
    """Return the checked-out commit, with `-dirty` where tracked files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Return the versions that decide the figures."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def meta(params: Mapping[str, Cell]) -> dict[str, object]:
    """Return where and how a report came about."""
    return {
        "commit": commit(),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "params": dict(params),
        "versions": versions(),
    }


def parse(name: str, arguments: Sequence[str], description: str | None = None) -> Options:
    """Read the flags that every benchmark takes; `--help` prints them below the description."""
    parser = argparse.ArgumentParser(
        prog=f"kvkeep bench {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="end within a minute, or what is said above"
    )
    parser.add_argument("--json", metavar="FILE|-", help="write the report as JSON")
    parser.add_argument("--peer", action="append", default=[], help="measure beside this peer")
    parser.add_argument("--threads", type=int, default=2, help="of the kernels (default: 2)")
    parser.add_argument("--only", action="append", default=[], help="measure this part alone")
    parser.add_argument("--model", metavar="DIR", help="measure this checkpoint")
    given = parser.parse_args(list(arguments))
    return Options(
        given.quick,
        given.json,
        tuple(given.peer),
        given.threads,
        only=tuple(given.only),
        model=given.model,
    )


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def print_tables(report: Report, console: Console) -> None:
    """Print the rows by their columns, then the figures."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for row in report.rows:
        groups.setdefault(tuple(row), []).append([_shown(cell) for cell in row.values()])
    for columns, rows in groups.items():
        print_wide(console, columns, rows, title=report.name)
    figures = [[_shown(cell) for cell in figure.row().values()] for figure in report.figures]
    if figures:
        columns = tuple(report.figures[0].row())
        print_wide(console, columns, figures, title=f"{report.name}: summary")


def deliver(report: Report, options: Options) -> None:
    """Print the tables and write the JSON document where it was asked for."""
    document = json.dumps(report.document(), indent=2)
    print_tables(report, NOTES if options.json == "-" else OUT)
    if options.json == "-":
        sys.stdout.write(document + "\n")
    elif options.json:
        Path(options.json).write_text(document + "\n", encoding="utf-8")


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the servers that a benchmark started end with it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(name: str, arguments: Sequence[str], measure: Callable[[Options], Report]) -> int:
    """Be a benchmark's `main`: parse, measure, report; `measure` lies in the described module."""
    options = parse(name, arguments, sys.modules[measure.__module__].__doc__)
    with unwound_by_sigterm():
        deliver(measure(options), options)
    return 0
