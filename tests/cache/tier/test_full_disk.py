"""A real file system without room, and one that is read-only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.cache.tier.full import PAGES, Told

MOUNT = 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"'


def in_namespace(folder: Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command with a tmpfs of 1 MiB at a folder, seen by it alone."""
    return subprocess.run(
        ["unshare", "-Urm", "sh", "-c", MOUNT, "sh", str(folder), *command],
        capture_output=True,
        check=False,
        timeout=60,
    )


def test_a_full_or_read_only_disk_costs_new_pages_alone(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or in_namespace(tmp_path, "true").returncode != 0:
        pytest.skip("no mount namespaces for this user")
    ran = in_namespace(tmp_path, sys.executable, "-m", "tests.cache.tier.full", str(tmp_path))
    assert ran.returncode == 0, ran.stderr.decode()
    told = msgspec.json.decode(ran.stdout, type=Told)
    assert PAGES // 3 < told.full.held < PAGES
    assert (told.full.wrong, told.full.missed) == (0, 0)
    assert told.full.errors["write:ENOSPC"] == PAGES - told.full.held
    assert (told.after.held, told.after.wrong, told.after.missed) == (told.full.held, 0, 0)
    assert "tier: can't write to" in told.refused
    assert "Read-only file system" in told.refused
