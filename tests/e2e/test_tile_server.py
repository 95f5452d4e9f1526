"""What a picture of a serving process's memory gives away, under `tile` and without it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest

from kvkeep.config import DEMO_MODEL
from kvkeep.engine.options import ShieldName
from kvkeep.models.text import TextModel
from tests.e2e.test_tiers_server import LETTER, SMALL, ask
from tests.engines import GREEDY, core_for, drive, manager_of, request
from tests.servers import serving

TENANT: Final = "harbour"
RUN: Final = 24
"""Tokens in a row that are looked for."""


def tokens_of(text: str) -> list[int]:
    return TextModel.load(DEMO_MODEL).encode(text)


def token_marks(prompt: list[int]) -> dict[str, bytes]:
    """Return how a run of tokens from a page's middle lies in memory, in any usual form."""
    run = prompt[70 : 70 + RUN]
    return {
        "int32": np.array(run, "<i4").tobytes(),
        "int64": np.array(run, "<i8").tobytes(),
        "message": b"".join(map(msgspec.msgpack.encode, run)),
    }


def page_marks(prompt: list[int]) -> dict[str, bytes]:
    """Return rows of a prompt's pages, as an engine like the server's computes them."""
    core = core_for(DEMO_MODEL, threads=1)
    drive(core, [request(prompt, GREEDY)])
    (root,) = manager_of(core).index.roots()
    page, pool = next(iter(root.children.values())), manager_of(core).pool
    found = {}
    for layer in range(pool.spec.num_layers):
        raw = np.frombuffer(pool.read(page.slot, layer), np.uint8).reshape(-1, 64)
        busy = next(row.tobytes() for row in raw if len(set(row.tolist())) > 24)
        found[f"layer {layer}"] = busy
    return found


def seen_in(process: int, marks: dict[str, bytes]) -> set[str]:
    """Return which of some bytes a process's memory holds."""
    found: set[str] = set()
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            place, rights, *_ = line.split()
            begin, end = (int(x, 16) for x in place.split("-"))
            if "r" not in rights or "[v" in line:
                continue
            for at in range(begin, end, 64 << 20):
                try:
                    memory.seek(at)
                    raw = memory.read(min(end - at, (64 << 20) + 4096))
                except OSError:
                    continue
                found |= {name for name, mark in marks.items() if mark in raw}
    return found


def seen_of(tmp_path: Path, mode: ShieldName, marks: dict[str, bytes]) -> set[str]:
    """Serve a prompt, wait until nothing runs, and look through all processes' memory.

    What the first process holds, the front end, is named so.
    """
    tmp_path.mkdir()
    options = (*SMALL, "--share", "isolate", "--shield", mode, "--shield-dumps")
    with serving(tmp_path, {TENANT: 0.9}, *options) as server:
        first = ask(server, TENANT)
        second = ask(server, TENANT)
        assert second[0] == first[0]
        assert second[1] >= 128
        end = time.monotonic() + 30
        while server.ready().engine.requests_running:
            assert time.monotonic() < end
            time.sleep(0.05)
        found = set()
        for process in server.tree():
            place = "front end: " if process == server.process.pid else ""
            found |= {place + name for name in seen_in(process, marks)}
        return found


@pytest.mark.slow
def test_a_picture_of_an_idle_engines_memory_names_no_cached_token(tmp_path: Path) -> None:
    prompt = tokens_of(f"{TENANT}: {LETTER}")
    marks = {**page_marks(prompt), **token_marks(prompt)}
    assert len(marks) > 3
    found = seen_of(tmp_path / "seal", "seal", marks)
    assert "int32" in found, "the search must find the tokens in a plain index"
    assert found >= {name for name in marks if name.startswith("layer")}
    found = seen_of(tmp_path / "tile", "tile", marks)
    assert {name for name in found if not name.startswith("front end")} == set()
