"""Our server beside a peer's, pair by pair, each through its own runner process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from bench import harness
from bench.harness import MIN_PAIRS, Cell, Figure, Goal, Options, Report, Row, ratio
from kvkeep.errors import ConfigError
from kvkeep.models import make

LIKE: Final = "qwen2.5-0.5b"
ROOT: Final = Path(__file__).resolve().parents[1]
REST_S: Final = 0.4
"""Until a runtime's idle threads stop spinning."""

RUNS: Final[dict[str, tuple[str, ...]]] = {
    "vllm": ("decode_b1", "decode_b8", "prefill"),
    "openvino": ("decode_b1", "decode_b8", "prefill"),
    "llamacpp": ("decode_b1",),
}
FIGURES: Final = {
    "decode_b1": "decode_b1_vs_{}",
    "decode_b8": "decode_b8_vs_{}",
    "prefill": "prefill_1k_vs_{}",
}
REQUESTS: Final = {
    "decode_b1": {"run": "decode_b1", "tokens": 48, "prompt": 32},
    "decode_b8": {"run": "decode_b8", "tokens": 32, "prompt": 32},
    "prefill": {"run": "prefill", "prompt": 1024},
}


class Runner:
    """A runner process of `tools/peers`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.ready = self._reply()

    def rate(self, run: str) -> float:
        """Return tokens per second of one run."""
        return float(self.measure(REQUESTS[run])["tokens_per_s"])

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request after a rest and return the reply; raises `ConfigError`."""
        time.sleep(REST_S)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        if "error" in reply:
            raise ConfigError(f"peer: {reply['peer']} failed at {request['run']}: {reply['error']}")
        return reply

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError("peer: the runner ended; its messages are above")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def runner(
    name: str, python: Path, model: Path, threads: int, *, option: str = ""
) -> Iterator[Runner]:
    """Start a runner, in a variant of its own, and wait until it has loaded and warmed up."""
    command = [str(python), "-m", f"tools.peers.{name}", str(model), "--threads", str(threads)]
    process = subprocess.Popen(
        [*command, "--option", option],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield Runner(process)
    finally:
        process.communicate(json.dumps({"run": "stop"}) + "\n", timeout=120)


def python_of(peer: str) -> Path:
    """Return a peer's interpreter."""
    python = ROOT / ".peers" / peer / "bin" / "python"
    if peer not in RUNS or not python.exists():
        raise ConfigError(f"peer: {peer!r} has no environment; build it with `make peers`")
    return python


def compare(peer: str, model: Path, options: Options) -> tuple[list[Figure], list[Row]]:
    """Return the ratios ours over the peer's, and both sides' medians."""
    figures: list[Figure] = []
    rows: list[Row] = []
    pairs = 3 if options.quick else MIN_PAIRS
    with (
        runner(peer, python_of(peer), model, options.threads) as theirs,
        runner("kvkeep", Path(sys.executable), model, options.threads) as ours,
    ):
        for run in RUNS[peer]:
            found = harness.interleave(
                lambda run=run: ours.rate(run),  # type: ignore[misc]
                lambda run=run: theirs.rate(run),  # type: ignore[misc]
                pairs,
            )
            figures.append(Figure(FIGURES[run].format(peer), ratio(found), Goal(">=", 1.0)))
            rows.append(
                {
                    "peer": f"{peer} {theirs.ready['version']}",
                    "run": run,
                    "ours_tokens_per_s": float(np.median([p.ours for p in found])),
                    "theirs_tokens_per_s": float(np.median([p.theirs for p in found])),
                }
            )
    return figures, rows


def measure(options: Options) -> Report:
    """Compare with every peer asked for, on random weights of Qwen2.5-0.5B's shapes."""
    figures: list[Figure] = []
    rows: list[Row] = []
    with TemporaryDirectory() as directory:
        model = make.make(LIKE, Path(directory) / LIKE, seed=0)
        for peer in options.peers or tuple(RUNS):
            found, lines = compare(peer, model, options)
            figures += found
            rows += lines
    params: dict[str, Cell] = {"model": LIKE, "dtype": "bfloat16", "threads": options.threads}
    return Report("peers", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("peers", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
