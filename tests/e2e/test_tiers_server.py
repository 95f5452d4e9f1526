"""Servers that are killed while they serve and started again: pages come back, answers stay."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
from openai import APIConnectionError, OpenAI

from kvkeep.config import DEMO_MODEL
from kvkeep.server.tenants import TenantFile
from tests.servers import Server, serving, started

TENANTS: Final = {"harbour": 0.25, "library": 0.25, "market": 0.2}
LETTER: Final = "The harbour master wrote to the library about the tide tables of the year. " * 12
QUESTIONS: Final = 30
SMALL: Final = ("--kv-cache-memory-bytes", "128MiB", "--threads", "1")


def opened(server: Server, tenant: str) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=server.keys[tenant], max_retries=0)


def ask(server: Server, tenant: str) -> tuple[str, int]:
    """Return an answer and how much of its prompt was cached."""
    with opened(server, tenant) as client:
        answer = client.completions.create(
            model="demo", prompt=f"{tenant}: {LETTER}", max_tokens=16, temperature=0.0
        )
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    return answer.choices[0].text, (details.cached_tokens or 0) if details is not None else 0


def kill(server: Server) -> None:
    """End a server and all below it at once."""
    for process in server.tree()[::-1]:
        os.kill(process, signal.SIGKILL)


def hits(server: Server) -> float:
    """Return the pages that the tiers brought back."""
    lines = server.admin("/metrics").text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("kvkeep:tier_hits_total"))


@pytest.mark.slow
def test_hits_outlive_a_kill(tmp_path: Path) -> None:
    tiers = ("--tier", "memory:16MiB", "--tier", f"disk:{tmp_path / 'tier'},256MiB")
    options = (*SMALL, "--share", "isolate", *tiers)
    with serving(tmp_path, TENANTS, *options) as server:
        first = {tenant: ask(server, tenant) for tenant in TENANTS}
        assert all(cached == 0 for _, cached in first.values())
        time.sleep(1.0)
        kill(server)
        with pytest.raises(APIConnectionError):
            ask(server, "market")
    with started(TenantFile(tmp_path / "keys.json"), server.keys, *options) as again:
        for tenant in TENANTS:
            text, cached = ask(again, tenant)
            assert text == first[tenant][0]
            assert cached >= 128
        assert hits(again) >= 6


def conversations() -> list[list[Any]]:
    """Return held-out conversations up to each question."""
    lines = (DEMO_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for messages in (json.loads(line)["messages"] for line in lines):
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        found += [messages[:turn] for turn in turns]
    return found[:QUESTIONS]


def answers(
    server: Server, tenant: str, asked: Sequence[list[Any]], killed_after: int | None
) -> list[str | None]:
    """Return a tenant's answers, as many as there are before the server ends.

    The tenant ends it after so many.
    """
    found: list[str | None] = []
    with opened(server, tenant) as client:
        for messages in asked:
            try:
                answer = client.chat.completions.create(
                    model="demo", messages=messages, max_tokens=16, temperature=0.0
                )
            except APIConnectionError:
                break
            found.append(answer.choices[0].message.content)
            if len(found) == killed_after:
                kill(server)
    return found


def all_answers(server: Server, *, killed_after: int | None = None) -> dict[str, Any]:
    """Let all tenants ask at a time; the first one's count of answers ends the server."""
    asked, first = conversations(), next(iter(TENANTS))
    with ThreadPoolExecutor(len(TENANTS)) as pool:
        running = {
            tenant: pool.submit(
                answers, server, tenant, asked, killed_after if tenant == first else None
            )
            for tenant in TENANTS
        }
        return {tenant: future.result() for tenant, future in running.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_answer_is_the_same_over_a_kill_with_everything_on(tmp_path: Path) -> None:
    shared = ("--share", "selective", "--share-k", "2", "--share-epoch-s", "1")
    options = (*SMALL, *shared, "--kv", "k2v2", "--evict", "corm")
    (tmp_path / "plain").mkdir()
    (tmp_path / "tiered").mkdir()
    with serving(tmp_path / "plain", TENANTS, *options, group="port") as plain:
        right = all_answers(plain)
    assert all(len(found) == QUESTIONS for found in right.values())
    tier = tmp_path / "tier"
    tiered = (*options, "--tier", "memory:8MiB", "--tier", f"disk:{tier},128MiB")
    with serving(tmp_path / "tiered", TENANTS, *tiered, group="port") as server:
        before = all_answers(server, killed_after=QUESTIONS // 2)
    assert len(before["harbour"]) == QUESTIONS // 2
    for tenant, found in before.items():
        assert found == right[tenant][: len(found)]
    with started(TenantFile(tmp_path / "tiered" / "keys.json"), server.keys, *tiered) as again:
        assert all_answers(again) == right
        assert hits(again) > 0
