"""Three tenants ask the demo model about one handbook, over the OpenAI API; ends with a table.

The handbook is the same for all of them. Each tenant's first question pays for reading it; the next
ones find it in the tenant's own pages. No tenant finds another's.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from openai import OpenAI

from kvkeep.cli.console import OUT, make_table
from kvkeep.config import DEMO_MODEL
from kvkeep.server.tenants import TenantFile

TENANTS: Final = ("harbour", "library", "market")
QUESTIONS: Final = 4
SIDES: Final = ("north", "south", "east", "west", "old", "new", "upper", "lower")
PLACES: Final = ("gate", "tower", "bridge", "vault", "cellar", "mill", "office", "stable")
NOTES: Final = (
    "Doors are closed at night and opened again in the morning.",
    "Whoever leaves last checks the lamps and writes a line in the book.",
    "A lost key is reported to the keeper, who returns a new one the next day.",
    "The list is read from top to bottom and changed only by the keeper.",
)
START_TIMEOUT_S: Final = 240.0


class Asked(NamedTuple):
    """One question and what came back."""

    tenant: str
    question: str
    answer: str
    expected: str
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float


def handbook(seed: int, places: int = 36) -> tuple[str, dict[str, str]]:
    """Return a long text and the access codes it gives, by place."""
    chance = random.Random(seed)
    names = [f"{side} {place}" for side in SIDES for place in PLACES]
    codes = {name: str(chance.randint(1000, 9999)) for name in chance.sample(names, places)}
    sentences = []
    for index, (name, code) in enumerate(codes.items()):
        sentences += [f"The access code of the {name} is {code}.", NOTES[index % len(NOTES)]]
    return " ".join(sentences), codes


class Served(NamedTuple):
    """Where a server listens."""

    url: str
    admin_url: str


@contextlib.contextmanager
def server(keys: Path, model: str, *options: str) -> Iterator[Served]:
    """Start `kvkeep serve` on free ports and yield its addresses."""
    command = [sys.executable, "-m", "kvkeep", "serve", "--model", model, "--keys", str(keys)]
    command += options
    log = keys.with_name("serve.log")
    with log.open("wb") as stream:
        process = subprocess.Popen([*command, "--port", "0", "--admin-port", "0"], stderr=stream)
    try:
        yield wait_for_url(process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for_url(process: subprocess.Popen[bytes], log: Path) -> Served:
    """Return the addresses the server announces."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8")
        found = re.search(r"API\s+(http://\S+)/v1\n", text)
        admin = re.search(r"admin\s+(http://\S+) ", text)
        if found and admin and "Ready." in text:
            return Served(found[1], admin[1])
        if process.poll() is not None:
            raise SystemExit(f"the server ended at once:\n{text}")
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready within {START_TIMEOUT_S:.0f} s")


def ask(client: OpenAI, tenant: str, book: str, place: str, code: str) -> Asked:
    """Ask one question about the handbook and time the first token."""
    question = f"What is the access code of the {place}?"
    model = client.models.list().data[0].id
    begin = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": book}, {"role": "user", "content": question}],
        max_tokens=12,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    answer, first, prompt, cached = "", None, 0, 0
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first or time.perf_counter()
            answer += piece
        if chunk.usage is not None:
            prompt = chunk.usage.prompt_tokens
            details = chunk.usage.prompt_tokens_details
            cached = (details.cached_tokens or 0) if details else 0
    ttft_ms = ((first or time.perf_counter()) - begin) * 1e3
    return Asked(tenant, question, answer.strip(), code, prompt, cached, ttft_ms)


def run(url: str, keys: dict[str, str], seed: int) -> list[Asked]:
    """Let every tenant ask its questions, in turns."""
    book, codes = handbook(seed)
    chance = random.Random(seed + 1)
    clients = {
        name: OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for name, key in keys.items()
    }
    found = []
    for place in chance.sample(list(codes), QUESTIONS):
        for name, client in clients.items():
            found.append(ask(client, name, book, place, codes[place]))
            OUT.print(f"  {name:<8} {found[-1].question}  {found[-1].answer}")
    return found


def report(found: list[Asked]) -> bool:
    """Print the table; return whether every answer was right."""
    rows = [
        (
            asked.tenant,
            asked.prompt_tokens,
            asked.cached_tokens,
            f"{asked.ttft_ms:.1f} ms",
            asked.answer + ("" if asked.answer == asked.expected else f" (was {asked.expected})"),
        )
        for asked in sorted(found, key=lambda asked: TENANTS.index(asked.tenant))
    ]
    OUT.print(make_table(("tenant", "prompt tokens", "cached tokens", "TTFT", "answer"), rows))
    right = sum(asked.answer == asked.expected for asked in found)
    OUT.print(f"{right} of {len(found)} answers are right.")
    return right == len(found)


def main() -> int:
    """Run the demo; return 0 where pages were reused, kept apart, and answers right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvkeep-demo-") as folder:
        file = TenantFile(Path(folder) / "keys.json")
        keys = {name: file.add(name, share=1 / len(TENANTS)).text for name in TENANTS}
        OUT.print("Starting a server for three tenants ...")
        with server(file.path, given.model) as (url, _):
            OUT.print(f"{url}: every tenant sends the same handbook and asks about it.\n")
            found = run(url, keys, given.seed)
    right = report(found) or given.model != str(DEMO_MODEL)
    kept_apart = all(asked.cached_tokens == 0 for asked in found[: len(TENANTS)])
    reused = all(asked.cached_tokens > 0 for asked in found[len(TENANTS) :])
    OUT.print("First questions read the handbook; later ones found it in their tenant's own pages.")
    OUT.print("To keep a server running: make serve; to talk to it: .venv/bin/kvkeep chat")
    return 0 if kept_apart and reused and right else 1


if __name__ == "__main__":
    sys.exit(main())
