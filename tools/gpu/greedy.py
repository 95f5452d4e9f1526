"""Serve a made checkpoint and compare greedy tokens with transformers': `-m tools.gpu.greedy`.

float32, so that the text must be the same until the two largest logits are closer than rounding;
prompts share a prefix of 512 tokens, so that later ones are read from pages, several in one step.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import httpx
import torch

from kvkeep.models import make
from kvkeep.models.text import TextModel
from tools.peers.kvkeep import API
from tools.peers.protocol import wait_until

LIKE: Final = "qwen2.5-0.5b"
LAYERS: Final = 6
PREFIX: Final = 512
TOKENS: Final = 24
REQUESTS: Final = 8
AGREE: Final = 8
"""Tokens whose text must agree; random weights make near-ties, which end agreement."""


def prompts(vocab: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of one prefix and tails of their own."""
    rng = random.Random(seed)
    prefix = [rng.randrange(100, vocab - 100) for _ in range(PREFIX)]
    tails = ([rng.randrange(100, vocab - 100) for _ in range(5 + i)] for i in range(REQUESTS))
    return [prefix + tail for tail in tails]


def expected(path: Path, asked: Sequence[Sequence[int]], device: str) -> list[list[int]]:
    """Return transformers' greedy continuations on a device."""
    from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: PLC0415 - slow

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    settings = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    model.generation_config = GenerationConfig()
    found = []
    for prompt in asked:
        ids = torch.tensor([list(prompt)], device=device)
        out = model.generate(ids, generation_config=settings)
        found.append(out[0, len(prompt) :].tolist())
    return found


def served(path: Path, asked: Sequence[Sequence[int]], device: str, *more: str) -> list[str]:
    """Return the greedy continuations of our server, the first alone, the rest at once."""
    command = [
        sys.executable, "-m", "kvkeep", "serve", "--no-auth", "--port", "0", "--admin-port", "0",
        "--model", str(path), "--served-model-name", "m", "--dtype", "float32",
        "--device", device, "--kv-cache-memory-bytes", "1GiB", *more,
    ]  # fmt: skip
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until(lambda: _address(process, Path(log.name)) is not None, 300)
            port = _address(process, Path(log.name))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
                first = _ask(client, asked[0])
                with ThreadPoolExecutor(len(asked)) as pool:
                    rest = pool.map(lambda prompt: _ask(client, prompt), asked[1:])
                    return [first, *rest]
        finally:
            process.terminate()
            process.wait(60)


def _address(process: subprocess.Popen[bytes], log: Path) -> int | None:
    text = log.read_text()
    if process.poll() is not None:
        raise RuntimeError(text)
    found = API.search(text)
    return None if found is None else int(found[1])


def _ask(client: httpx.Client, prompt: Sequence[int]) -> str:
    body = {
        "model": "m", "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip
    reply = client.post("/v1/completions", json=body)
    reply.raise_for_status()
    text: str = reply.json()["choices"][0]["text"]
    return text


def agreement(ours: str, theirs: Sequence[int], decode: Callable[[Sequence[int]], str]) -> int:
    """Return how many leading tokens of theirs have the text that ours begins with."""
    same = (n for n in range(len(theirs), 0, -1) if ours.startswith(decode(theirs[:n])))
    return next(same, 0)


def main() -> int:
    """Compare and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make.make(LIKE, Path(folder) / "model", seed=0, layers=LAYERS, dtype="float32")
        vocab = json.loads((path / "config.json").read_text())["vocab_size"]
        asked = prompts(vocab)
        ours = served(path, asked, arguments.device)
        theirs = expected(path, asked, arguments.device)
        decode = TextModel.load(path).decode
    same = [agreement(one, other, decode) for one, other in zip(ours, theirs, strict=True)]
    report = {"tokens": TOKENS, "same": same, "device": arguments.device}
    print(json.dumps(report))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if min(same) >= AGREE else 1


if __name__ == "__main__":
    sys.exit(main())
