from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvkeep.cache.tier.files import Directory
from kvkeep.cache.tier.segments import Segments
from tests.cache.tier.killed import LIMIT, PAGES, frame_of

OPERATIONS = 440
"""That the process does at least."""


def survives(directory: Path, number: int) -> bool:
    """Kill a writing process at an operation and check what a new one finds."""
    command = [sys.executable, "-m", "tests.cache.tier.killed", str(directory), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    wrote = {int(page) for what, page in said if what == "wrote"}
    dropping = {int(page) for what, page in said if what == "dropping"}
    segments = Segments(Directory(directory), LIMIT)
    found = {int.from_bytes(one.name, "big"): one for one in segments.open(0.0)}
    for page, one in found.items():
        assert segments.read(one.name, one.place) == frame_of(page)
    assert wrote - dropping <= found.keys(), "what was written is there"
    last = max(dropping, default=-1)
    assert not (dropping - {last}) & found.keys(), "what was dropped is not"
    more = 10**6
    segments.append(more.to_bytes(24, "big"), b"s" * 16, 0.0, frame_of(more))
    segments.close()
    return done.returncode == -signal.SIGKILL


def test_a_killed_process_leaves_whole_pages(tmp_path: Path) -> None:
    for number in (3, 150, 307):
        assert survives(tmp_path / str(number), number)


def test_one_process_is_killed_again_and_again(tmp_path: Path) -> None:
    assert all(survives(tmp_path, number) for number in (90, 41))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_anywhere(tmp_path: Path) -> None:
    killed = [survives(tmp_path / str(number), number) for number in range(500)]
    assert sum(killed) >= OPERATIONS
    assert PAGES > 100
