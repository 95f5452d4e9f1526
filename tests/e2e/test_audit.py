"""The audit against a real server: what shares everything is caught, what shares nothing is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kvkeep.audit import Options, Report, audit, cast_of
from kvkeep.audit.channels import CHANNELS
from kvkeep.cli import run
from tests.servers import Server, serving

TENANTS: Final = {"victim": 0.3, "attacker": 0.3, "sybil": 0.1}
"""What they leave of the pool holds public pages."""
SMALL: Final = ("--kv-cache-memory-bytes", "256MiB", "--threads", "2")
UNSAFE: Final = ("--share", "all", "--unsafe-share-all")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("apart"), TENANTS, *SMALL) as running:
        yield running


def keys(server: Server) -> list[str]:
    return [f"{name}={server.keys[name]}" for name in TENANTS]


def audited(server: Server, *channels: str, margin: float, seconds: float) -> Report:
    options = Options(
        server.url,
        cast_of(keys(server)),
        channels=channels,
        margin=margin,
        seconds=seconds,
        per_second=1000.0,
        prompt_tokens=512,
    )
    return asyncio.run(audit(options))


def test_sharing_everything_is_caught_by_time_alone(tmp_path: Path) -> None:
    with serving(tmp_path, TENANTS, *SMALL, *UNSAFE) as server:
        words = [word for key in keys(server) for word in ("--key", key)]
        report = tmp_path / "report.json"
        page = tmp_path / "report.html"
        options = ("--channels", "ttft", "--prompt-tokens", "512", "--rate", "1000")
        files = ("--json", str(report), "--html", str(page))
        code = run(["attack", server.url, *words, *options, "--seconds", "60", *files])
        assert code == 3
        (found,) = json.loads(report.read_text())["channels"]
        assert found["outcome"] == "leak"
        assert found["auc"] >= 0.8
        assert not any(key in page.read_text() for key in server.keys.values())


def test_sharing_nothing_is_clean_by_time_and_by_count(apart: Server) -> None:
    report = audited(apart, "ttft", "cached_tokens", margin=0.15, seconds=60.0)
    assert report.verdict == "clean", report.reason
    assert {finding.outcome for finding in report.channels} == {"clean"}


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_sharing_nothing_is_clean_in_every_channel(apart: Server) -> None:
    report = audited(apart, margin=0.05, seconds=900.0)
    assert report.verdict == "clean", report.reason
    assert {finding.facts.name for finding in report.channels} == set(CHANNELS)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_sharing_everything_is_caught_in_every_way_that_it_leaks(tmp_path: Path) -> None:
    with serving(tmp_path, TENANTS, *SMALL, *UNSAFE) as server:
        report = audited(server, margin=0.1, seconds=600.0)
    leaking = {f.facts.name for f in report.channels if f.outcome == "leak"}
    assert leaking >= {"ttft", "early_bird", "cached_tokens", "boundary", "sentinel"}
