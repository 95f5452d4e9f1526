"""No worker outlives whoever leads it: nothing is served or public that nobody counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.disagg.pairs import until
from tests.disagg.rays import ray_nodes

GONE_S = 60.0
"""No worker's patience, but what a loaded machine may take."""


def lives(pid: int) -> bool:
    """Tell whether a process is there and not only waits to be taken note of."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


@contextmanager
def leading(
    model: Path, prefill: int, address: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Yield the process that leads so many prefill workers and one that decodes, and theirs."""
    command = [sys.executable, "-m", "tests.disagg.leader", str(model), str(prefill), address]
    names = {**os.environ, **(environment or {})}
    workers: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=names) as leader:
        try:
            assert leader.stdout is not None
            pid, *workers = map(int, leader.stdout.readline().split())
            yield pid, workers
        finally:
            leader.kill()
            for worker in filter(lives, workers):  # one that does outlive it
                os.kill(worker, signal.SIGKILL)


async def killed(pid: int, workers: list[int]) -> None:
    assert all(map(lives, workers))
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not any(map(lives, workers)), GONE_S)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("prefill", [0, pytest.param(2, marks=pytest.mark.slow)])
async def test_workers_end_with_the_process_that_leads_them(
    tiny: dict[str, Path], prefill: int
) -> None:
    with leading(tiny["qwen2"], prefill) as (pid, workers):
        assert len(workers) == prefill + 1
        await killed(pid, workers)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_workers_on_ray_end_with_the_process_that_leads_them(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    (token := tmp_path / "token").write_text("5" * 64)
    names = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with (
        ray_nodes(1, names) as address,
        leading(tiny["qwen2"], 1, address, names) as (pid, workers),
    ):
        assert len(workers) == 2
        await killed(pid, workers)
