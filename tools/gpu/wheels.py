"""Gather in `.gpu-wheels/` what a bare GPU machine lacks: `python -m tools.gpu.wheels`.

Such a machine has Python 3.12, torch, Triton, transformers and a build chain, and no network. The
folder travels with the checkout, so it may hold 64 MiB at most.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / ".gpu-wheels"
LIMIT_BYTES: Final = 64 << 20
PYTHON: Final = "3.12"
PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

NEEDED: Final = (
    "annotated-types",
    "httpcore",
    "httpx",
    "iniconfig",
    "msgspec",
    "nanobind",
    "packaging",
    "pathspec",
    "pluggy",
    "pydantic",
    "pydantic-settings",
    "pydantic_core",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "python-dotenv",
    "scikit_build_core",
    "starlette",
    "typing-inspection",
    "uvicorn",
)
"""What engine, server, tests and build need that the machine lacks, or has in another version."""

FLASHINFER: Final = ("flashinfer-python", "apache-tvm-ffi")
"""Only for the comparison; about 62 MiB, too much beside the rest on most days."""

Run = Callable[[Sequence[str]], None]


def download(names: Sequence[str], folder: Path) -> list[str]:
    """Return the command that fetches wheels of exactly these packages."""
    platforms = [flag for name in PLATFORMS for flag in ("--platform", name)]
    return [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
        "--python-version", PYTHON, "--implementation", "cp", *platforms,
        "-c", str(ROOT / "constraints.txt"), "-d", str(folder), *names,
    ]  # fmt: skip


def gather(names: Sequence[str], folder: Path, run: Run) -> int:
    """Fill the folder afresh and return its bytes; raises `RuntimeError` above the limit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run(download(names, folder))
    total = sum(path.stat().st_size for path in folder.iterdir())
    if total > LIMIT_BYTES:
        shutil.rmtree(folder)
        raise RuntimeError(
            f"the wheels take {total / 2**20:.1f} MiB, more than {LIMIT_BYTES >> 20}: name fewer"
        )
    return total


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True)


def main() -> int:
    """Gather the wheels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flashinfer", action="store_true", help="the peer of the grid, too")
    names = NEEDED + (FLASHINFER if parser.parse_args().flashinfer else ())
    try:
        total = gather(names, FOLDER, _run)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"gpu-wheels: {error}", file=sys.stderr)
        return 1
    print(f"{FOLDER.name}: {len(list(FOLDER.iterdir()))} wheels, {total / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
