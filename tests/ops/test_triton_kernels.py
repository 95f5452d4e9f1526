"""The kernels as a compiler sees them: what the interpreter accepts must also compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvkeep.ops import tasks, triton_kernels


@pytest.mark.slow
def test_they_compile_for_hopper_with_matrix_units_and_asynchronous_copies(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels"],
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )


def test_host_and_kernels_agree_on_a_task() -> None:
    assert triton_kernels.TASK_FIELDS.value == tasks.TASK_FIELDS
