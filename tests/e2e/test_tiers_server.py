"""A server that is killed while it serves and started again finds its tenants' pages."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Final

import pytest
from openai import APIConnectionError, OpenAI

from kvkeep.server.tenants import TenantFile
from tests.servers import Server, serving, started

TENANTS: Final = {"harbour": 0.4, "library": 0.3, "market": 0.3}
LETTER: Final = "The harbour master wrote to the library about the tide tables of the year. " * 12


def ask(server: Server, tenant: str) -> tuple[str, int]:
    """Return an answer and how much of its prompt was cached."""
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.keys[tenant], max_retries=0) as client:
        answer = client.completions.create(
            model="demo", prompt=f"{tenant}: {LETTER}", max_tokens=16, temperature=0.0
        )
    usage = answer.usage
    assert usage is not None
    details = usage.prompt_tokens_details
    return answer.choices[0].text, (details.cached_tokens or 0) if details is not None else 0


def written_pages(server: Server) -> int:
    """Return the pages that the disk holds."""
    return sum(1 for line in server.admin("/metrics").text.splitlines() if "tier_pages" in line)


@pytest.mark.slow
def test_hits_outlive_a_kill(tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    small = ("--kv-cache-memory-bytes", "128MiB", "--threads", "1", "--share", "isolate")
    options = (*small, "--tier", "memory:16MiB", "--tier", f"disk:{tier},256MiB")
    with serving(tmp_path, TENANTS, *options) as server:
        first = {tenant: ask(server, tenant) for tenant in TENANTS}
        assert all(cached == 0 for _, cached in first.values())
        assert written_pages(server) > 0
        time.sleep(1.0)
        for process in server.tree()[::-1]:
            os.kill(process, signal.SIGKILL)
        with pytest.raises(APIConnectionError):
            ask(server, "market")
    file = TenantFile(tmp_path / "keys.json")
    with started(file, server.keys, *options) as again:
        for tenant in TENANTS:
            text, cached = ask(again, tenant)
            assert text == first[tenant][0]
            assert cached >= 128
