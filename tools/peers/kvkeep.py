"""Our own server as its users start it, one tenant's key, measured over HTTP like the others."""

from __future__ import annotations

import importlib.metadata
import json
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.peers.completions import CompletionsPeer
from tools.peers.protocol import Arguments, Loaded, Measured, serve, wait_until

NAME = "peer"
API = re.compile(r"API\s+http://127\.0\.0\.1:(\d+)/v1")
ADMIN = re.compile(r"admin\s+(http://127\.0\.0\.1:\d+) ")
STEPS = ("kvkeep:attention_tree_steps_total", "kvkeep:engine_steps_total")


class Admin(NamedTuple):
    """The admin port and what it asks for."""

    url: str
    token: str


class KvkeepServer(CompletionsPeer):
    """The server process and its client."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, key: str, admin: Admin) -> None:
        super().__init__(port, NAME, key)
        self._process = process
        self._admin = admin

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
        """Measure as for every server, and count the steps that shared."""
        before = self._steps()
        measured = super().decode(prompts, tokens)
        tree, steps = (now - then for now, then in zip(self._steps(), before, strict=True))
        return measured._replace(tree_share=tree / steps)

    def close(self) -> None:
        """End the server and its engine."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def _steps(self) -> list[float]:
        request = urllib.request.Request(  # noqa: S310 - our http URL
            f"{self._admin.url}/metrics", headers={"Authorization": f"Bearer {self._admin.token}"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - our http URL
            page = answer.read().decode()
        found = [re.search(rf"^{name}{{.*}} (\S+)$", page, re.MULTILINE) for name in STEPS]
        return [float(one[1]) for one in found if one is not None]


def load(arguments: Arguments) -> Loaded:
    """Start `kvkeep serve` and wait until it says where it listens."""
    folder = Path(tempfile.mkdtemp())
    token = folder / "token"
    token.write_text(secrets.token_hex())
    token.chmod(0o600)
    kvkeep = [sys.executable, "-m", "kvkeep"]
    keys = ["--keys", str(folder / "keys.json")]
    added = [*kvkeep, "tenant", "add", "peer", "--share", "1", *keys]
    key = subprocess.run(added, check=True, capture_output=True, text=True).stdout.split()[-1]
    command = [
        *kvkeep, "serve", *keys, "--port", "0", "--admin-port", "0",
        "--admin-token-file", str(token), "--model", str(arguments.model),
        "--served-model-name", NAME, "--threads", str(arguments.threads),
        "--kv-cache-memory-bytes", "4GiB", "--max-num-seqs", "64",
        "--max-num-batched-tokens", "1024",
        *(["--weights", "int8"] if arguments.option == "int8" else []),
    ]  # fmt: skip
    log = folder / "serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)

    def said(pattern: re.Pattern[str]) -> str:
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        found = pattern.search(log.read_text())
        return found[1] if found else ""

    wait_until(lambda: bool(said(API) and said(ADMIN) and "Ready." in log.read_text()), 300)
    admin = Admin(said(ADMIN), token.read_text())
    server = KvkeepServer(process, int(said(API)), key, admin)
    config = json.loads((arguments.model / "config.json").read_text())
    settings: dict[str, object] = {"dtype": "bfloat16", "weights": arguments.option or "float"}
    return Loaded(
        "kvkeep", importlib.metadata.version("kvkeep"), settings, server, config["vocab_size"]
    )


if __name__ == "__main__":
    serve(load)
