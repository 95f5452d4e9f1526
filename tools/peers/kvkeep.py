"""Our own server as its users start it, measured over HTTP like the others."""

from __future__ import annotations

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.peers.completions import CompletionsPeer
from tools.peers.protocol import Arguments, Loaded, serve, wait_until

NAME = "peer"
ADDRESS = re.compile(r"API\s+http://127\.0\.0\.1:(\d+)/v1")


class KvkeepServer(CompletionsPeer):
    """The server process and its client."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        super().__init__(port, NAME)
        self._process = process

    def close(self) -> None:
        """End the server and its engine."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def load(arguments: Arguments) -> Loaded:
    """Start `kvkeep serve` and wait until it says where it listens."""
    command = [
        sys.executable, "-m", "kvkeep", "serve", "--no-auth", "--port", "0", "--admin-port", "0",
        "--model", str(arguments.model), "--served-model-name", NAME,
        "--threads", str(arguments.threads), "--kv-cache-memory-bytes", "1GiB",
        "--max-num-batched-tokens", "1024",
        *(["--weights", "int8"] if arguments.option == "int8" else []),
    ]  # fmt: skip
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)

    def said() -> re.Match[str] | None:
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        return ADDRESS.search(log.read_text())

    wait_until(lambda: said() is not None, 300)
    found = said()
    assert found is not None
    server = KvkeepServer(process, int(found[1]))
    config = json.loads((arguments.model / "config.json").read_text())
    settings: dict[str, object] = {"dtype": "bfloat16", "weights": arguments.option or "float"}
    return Loaded(
        "kvkeep", importlib.metadata.version("kvkeep"), settings, server, config["vocab_size"]
    )


if __name__ == "__main__":
    serve(load)
