"""What a benchmark and a peer's runner say to each other: a JSON object per line, stdin and stdout.

    runner ->  {"peer": "vllm", "ready": true, "version": "...", "settings": {...}}
    bench  ->  {"run": "decode_b8", "tokens": 64, "prompt": 32}
    runner ->  {"peer": "vllm", "run": "decode_b8", "tokens": 504,
               "seconds": 3.1, "tokens_per_s": 162.6}
    bench  ->  {"run": "stop"}                                   (or stdin closes)

Runs: `prefill` (of `prompt` fresh tokens), `decode_b1`, `decode_b8` (`tokens` per sequence after
`prompt` fresh tokens each; the time to the first token does not count), `fanout` (`batch` sequences
that go on from the same `prefix` tokens, which a request before them has left in the cache, with
`prompt` fresh tokens each; a longer prefix begins with a shorter one). One that fails answers
{"peer", "run", "error"}. A runner is started from the repository's root, in the peer's environment:
`.peers/vllm/bin/python -m tools.peers.vllm MODEL`; this module needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO


class Measured(NamedTuple):
    """Tokens handled and the time they took."""

    tokens: int
    seconds: float
    tree_share: float | None = None
    """Of our own steps: those in which requests read pages together."""


class Peer(Protocol):
    """A loaded engine: greedy decoding, no end-of-text, every prompt new."""

    def prefill(self, prompt: Sequence[int]) -> Measured:
        """Measure from the prompt's submission to its first token."""

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
        """Measure the tokens after every sequence's first, while all of them are being decoded."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What every runner is started with."""

    model: Path
    threads: int
    option: str
    """The peer's own variant, e.g. a weight format; empty for its best."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A peer and how it is described in results."""

    name: str
    version: str
    settings: dict[str, object]
    peer: Peer
    vocab: int


def fresh_prompt(length: int, vocab: int, rng: random.Random) -> list[int]:
    """Return random ids, away from the ends of the vocabulary where special tokens are."""
    return [rng.randrange(vocab // 4, vocab // 4 * 3) for _ in range(length)]


def window(arrivals: Sequence[Sequence[float]]) -> Measured:
    """Return the tokens that arrived while every sequence was decoding.

    `arrivals` holds each sequence's token times in seconds; the window runs from the last first
    token to the first last token.
    """
    begin = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    count = sum(begin < t <= end for times in arrivals for t in times)
    if count == 0:
        raise ValueError("the sequences never decoded together: ask for more tokens")
    return Measured(count, end - begin)


def wait_until(ready: Callable[[], bool], timeout_s: float) -> None:
    """Poll until `ready`; raises `TimeoutError`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready after {timeout_s:.0f} s")
        time.sleep(0.2)


def serve(load: Callable[[Arguments], Loaded]) -> None:
    """Load the peer, run everything once unmeasured, then answer requests until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--option", default="", help="the peer's own variant")
    given = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded = load(Arguments(given.model.resolve(), given.threads, given.option))
    rng = random.Random(0)
    try:
        for run in ("decode_b1", "decode_b8", "prefill"):
            _measure(loaded, run, {"tokens": 8}, rng)
        _answer(loaded, rng, replies)
    finally:
        loaded.peer.close()


def _answer(loaded: Loaded, rng: random.Random, replies: TextIO) -> None:
    def say(**fields: object) -> None:
        print(json.dumps({"peer": loaded.name, **fields}), file=replies, flush=True)

    say(ready=True, version=loaded.version, settings=loaded.settings)
    for line in sys.stdin:
        request = json.loads(line)
        run = request["run"]
        if run == "stop":
            return
        try:
            measured = _measure(loaded, run, request, rng)
        except Exception as error:  # noqa: BLE001 - whatever fails is told, the next run may work
            traceback.print_exc()
            say(run=run, error=str(error) or type(error).__name__)
            continue
        rate = measured.tokens / measured.seconds
        notes = {} if measured.tree_share is None else {"tree_share": measured.tree_share}
        say(run=run, tokens=measured.tokens, seconds=measured.seconds, tokens_per_s=rate, **notes)


def _measure(loaded: Loaded, run: str, request: dict[str, int], rng: random.Random) -> Measured:
    if run == "prefill":
        return loaded.peer.prefill(fresh_prompt(request.get("prompt", 1024), loaded.vocab, rng))
    if run not in ("decode_b1", "decode_b8", "fanout"):
        raise ValueError(f"unknown run {run}: choose prefill, decode_b1, decode_b8, fanout or stop")
    batch, prefix = int(run[-1]) if run != "fanout" else request["batch"], []
    if run == "fanout":
        length = request["prefix"]
        prefix = fresh_prompt(length, loaded.vocab, random.Random(0))
        loaded.peer.prefill(prefix)
    own = request.get("prompt", 32)
    prompts = [prefix + fresh_prompt(own, loaded.vocab, rng) for _ in range(batch)]
    return loaded.peer.decode(prompts, request.get("tokens", 64))
