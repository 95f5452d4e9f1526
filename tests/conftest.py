"""What every test relies on: none of the caller's settings, two threads, no network."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from kvkeep.shield.secret import overwrite_freed
from tests import counts

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run on the CPU
for _name in [name for name in os.environ if name.startswith("KVKEEP_")]:
    del os.environ[_name]

pytest_plugins = ("tests.checkpoints",)
BACKENDS = ("reference", "portable", "avx2", "avx512", "triton")


def pytest_configure(config: pytest.Config) -> None:
    """Tell `tests.counts` whether the slow tests run too: then nothing is cut short."""
    os.environ[counts.AT_LENGTH] = str(int("not slow" not in str(config.option.markexpr)))


@pytest.fixture(autouse=True)
def _freed_as_before() -> Iterator[None]:
    """Let freed memory be: an engine under `tile` in this process has it overwritten."""
    yield
    overwrite_freed(wanted=False)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Give back the root logger as it was: `kvkeep serve` in this process sets it up anew."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def backend_of(nodeid: str) -> str | None:
    """Return the kernel backend that a test's parameters name."""
    words = nodeid.partition("[")[2].rstrip("]").split("-")
    return next((name for name in BACKENDS if name in words), None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests of each kernel backend passed and were skipped."""
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            name = backend_of(report.nodeid)
            if name and (outcome == "skipped" or report.when == "call"):
                counts[name, outcome] += 1
    if counts:
        shown = (f"{name} {outcome} {count}" for (name, outcome), count in sorted(counts.items()))
        terminalreporter.write_line("backends: " + ", ".join(shown))
