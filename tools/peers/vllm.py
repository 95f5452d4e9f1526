"""vLLM's own server on its CPU backend, compiled, measured over HTTP.

`--option eager` leaves compilation out.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

from tools.peers.completions import CompletionsPeer
from tools.peers.protocol import Arguments, Loaded, serve, wait_until

NAME = "peer"
EAGER = ("--enforce-eager",)


class VllmServer(CompletionsPeer):
    """The server process and its client."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        super().__init__(port, NAME)
        self._process = process
        self.url = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        """Tell whether it answers; raises `RuntimeError` where it died."""
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended with code {self._process.returncode}")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:  # noqa: S310 - our http URL
                return bool(answer.status == 200)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def close(self) -> None:
        """End the server and the engine process it started."""
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def start(
    python: str, model: Path, threads: int, *arguments: str, log: IO[Any] = sys.stderr
) -> VllmServer:
    """Start the server in a peer's environment and wait until it answers.

    Raises `RuntimeError` where it ends before, `TimeoutError` where it takes a quarter of an hour.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", NAME,
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "bfloat16", "--max-num-seqs", "64", "--max-num-batched-tokens", "2048",
        *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=log, stderr=log)
    server = VllmServer(process, port)
    try:
        wait_until(server.ready, 900)
    except BaseException:
        server.close()
        raise
    return server


def load(arguments: Arguments) -> Loaded:
    """Start the server with room for long contexts."""
    server = start(
        sys.executable, arguments.model, arguments.threads,
        "--max-model-len", "8192", "--kv-cache-memory-bytes", str(4 << 30),
        *(EAGER if arguments.option == "eager" else ()),
    )  # fmt: skip
    config = json.loads((arguments.model / "config.json").read_text())
    settings = {"dtype": "bfloat16", "compiled": arguments.option != "eager"}
    version = importlib.metadata.version("vllm-cpu")
    return Loaded("vllm", version, settings, server, config["vocab_size"])


if __name__ == "__main__":
    serve(load)
