"""`.ci/run` over a Makefile of our own: any failure counts, pytest's line comes last."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLOSING = "3 passed, 1 skipped in 61.10s (0:01:01)"
LONG_CLOSING = f"===== 1 failed, {CLOSING} ====="
TARGETS = ("setup", "lint", "types", "layers", "size", "cov")


def run_ci(
    root: Path, failing: str | None, closing: str = CLOSING
) -> subprocess.CompletedProcess[str]:
    (root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", root / ".ci")
    rules = [
        f"{name}:\n\t@echo ran {name}\n"
        + (f'\t@echo "{closing}"; echo after it\n' if name == "cov" else "")
        + ("\t@false\n" if name == failing else "")
        for name in TARGETS
    ]
    (root / "Makefile").write_text("\n".join(rules))
    return subprocess.run(
        ["bash", root / ".ci" / "run"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_all_green_is_zero_and_ends_with_the_summary(tmp_path: Path) -> None:
    done = run_ci(tmp_path, None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == CLOSING
    assert all(f"ran {name}" in done.stdout for name in TARGETS)


def test_the_long_form_of_the_summary_is_known_too(tmp_path: Path) -> None:
    done = run_ci(tmp_path, "cov", LONG_CLOSING)
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1] == LONG_CLOSING


@pytest.mark.parametrize("failing", TARGETS)
def test_one_failure_is_not_zero(tmp_path: Path, failing: str) -> None:
    done = run_ci(tmp_path, failing)
    assert done.returncode == 1
    if failing != "setup":
        assert done.stdout.strip().splitlines()[-1] == CLOSING
        assert all(f"ran {name}" in done.stdout for name in TARGETS)
