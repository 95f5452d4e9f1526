"""Everything that needs a CUDA device, in one call: `python3 -m tools.gpu.check [--out FOLDER]`.

Builds from `.gpu-wheels/` without a network, runs the device's tests, serves a made checkpoint
with `--device cuda` and compares its greedy tokens with transformers', then measures the attention
grid, and attention on codes at 1K to 128K tokens. Every step runs even where an earlier one failed,
but for the build; the table at the end says which held, and the exit status is 1 where one did not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tools.gpu.wheels import FOLDER, NEEDED, ROOT

TESTS: Final = ("tests/ops/test_checks.py", "tests/ops/test_triton_attention.py",
                "tests/ops/test_triton_codes.py", "tests/ops/test_triton_refused.py",
                "tests/ops/test_device.py", "tests/ops/test_tasks.py",
                "tests/attention/test_profile.py", "tests/engine/test_backend.py",
                "tests/e2e/test_device.py", "tests/bench/test_attention_gpu.py",
                "tests/bench/test_codes_gpu.py")  # fmt: skip


class Step(NamedTuple):
    """One command of the check."""

    name: str
    command: list[str]
    needed: bool = False
    """Whether nothing else makes sense without it."""


class Outcome(NamedTuple):
    """How a step ended."""

    name: str
    passed: bool
    seconds: float


def steps(out: Path, *, quick: bool) -> list[Step]:
    """Return the steps in order."""
    python = sys.executable
    offline = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    pytest = [python, "-m", "pytest", "-m", "not ray", "-p", "no:cacheprovider"]
    grid, codes = (
        ["--json", str(out / f"{name}.json"), *(["--quick"] if quick else [])]
        for name in ("attention_gpu", "codes_gpu")
    )
    return [
        Step("wheels", [*offline, "--find-links", str(FOLDER), *NEEDED], needed=True),
        Step("build", [*offline, "--no-build-isolation", "-e", str(ROOT)], needed=True),
        Step("tests", [*pytest, *TESTS]),
        Step("greedy", [python, "-m", "tools.gpu.greedy", "--out", str(out / "gpu_greedy.json")]),
        Step("grid", [python, "-m", "bench.attention_gpu", *grid]),
        Step("codes", [python, "-m", "bench.codes_gpu", *codes]),
    ]


def check(plan: Sequence[Step], run: Callable[[Sequence[str]], int]) -> list[Outcome]:
    """Run the steps and return how each ended; a needed one that fails is the last."""
    found = []
    for step in plan:
        begun = time.perf_counter()
        passed = run(step.command) == 0
        found.append(Outcome(step.name, passed, time.perf_counter() - begun))
        if step.needed and not passed:
            break
    return found


def _run(command: Sequence[str]) -> int:
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    """Check this machine's device."""
    import torch  # noqa: PLC0415 - the machine's own, before anything is installed

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--quick", action="store_true", help="some cells of the grid")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device and this machine has none", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = check(steps(arguments.out, quick=arguments.quick), _run)
    summary = {"device": torch.cuda.get_device_name(), "steps": [o._asdict() for o in found]}
    (arguments.out / "gpu_check.json").write_text(json.dumps(summary, indent=2) + "\n")
    for outcome in found:
        print(
            f"{outcome.name:<8} {'ok' if outcome.passed else 'FAILED':<7} {outcome.seconds:.0f} s"
        )
    return 0 if all(outcome.passed for outcome in found) else 1


if __name__ == "__main__":
    sys.exit(main())
