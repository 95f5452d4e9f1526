"""A group's prompt over HTTP: what others sent saves a tenant time, and nothing else shows it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import httpx
from openai import OpenAI

from kvkeep.config import CONSENT_PATH
from kvkeep.metrics import PUBLIC_UNITS, SAVED_TOKENS, SHARING_EPOCH, Metric
from tests.servers import Server, serving

K: Final = 2
SENDERS: Final = tuple(f"sender-{i}" for i in range(K))
READERS: Final = ("reader-0", "reader-1")
SHARES: Final = dict.fromkeys((*SENDERS, *READERS), 0.2)
UNIT_TOKENS: Final = 256
WAIT_S: Final = 30.0
PROMPT: Final = "The opening hours of the library depend on the season and on the weather. " * 30
OPTIONS: Final = (
    *("--share-k", str(K), "--share-epoch-s", "1"),
    *("--kv-cache-memory-bytes", "256MiB", "--threads", "2"),
)


class Answer(NamedTuple):
    """What a tenant is told."""

    text: str
    prompt_tokens: int
    cached_tokens: int


def ask(server: Server, tenant: str) -> Answer:
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.keys[tenant], max_retries=0) as client:
        reply = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=16, temperature=0.0
        )
    usage = reply.usage
    assert usage is not None
    details = usage.prompt_tokens_details
    cached = 0 if details is None else details.cached_tokens or 0
    return Answer(reply.choices[0].text, usage.prompt_tokens, cached)


def gauge(server: Server, metric: Metric) -> float:
    page = server.admin("/metrics").text
    found = re.search(rf"^{metric.full_name}(?:_total)?{{.*}} (\S+)$", page, re.MULTILINE)
    assert found is not None, metric.full_name
    return float(found[1])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


def epochs_later(server: Server, count: int) -> Callable[[], bool]:
    until = gauge(server, SHARING_EPOCH) + count
    return lambda: gauge(server, SHARING_EPOCH) >= until


def test_what_k_others_sent_saves_computing_and_shows_in_nothing(tmp_path: Path) -> None:
    rules, consent = tmp_path / "org.toml", tmp_path / "consent"
    rules.write_text('[[words]]\nwords = ["observatory"]\n')
    consent.write_text("this operator consents\n")
    files = ("--share-rules", str(rules), "--audit-consent-file", str(consent))
    with serving(tmp_path, SHARES, *OPTIONS, *files, group="all") as server:
        cold = ask(server, SENDERS[0])
        assert cold.cached_tokens == 0
        wait_for(epochs_later(server, 3))
        assert gauge(server, PUBLIC_UNITS) == 0, "one tenant is no crowd"
        for name in SENDERS[1:]:
            assert ask(server, name) == cold
        wait_for(lambda: gauge(server, PUBLIC_UNITS) > 0)
        for i, name in enumerate(READERS):
            assert ask(server, name) == cold, "its first answer, as if it were alone"
            whole = cold.prompt_tokens // UNIT_TOKENS * UNIT_TOKENS
            assert gauge(server, SAVED_TOKENS) == (i + 1) * whole
        assert ask(server, READERS[0]).cached_tokens == cold.prompt_tokens

        rules.write_text('[[words]]\nword = ["library"]\n')
        wait_for(lambda: "the rules in force stay" in server.log.read_text())
        assert f"share_rules: {rules}:2: " in server.log.read_text()
        assert gauge(server, PUBLIC_UNITS) > 0
        rules.write_text('[[words]]\nwords = ["library"]\n')
        wait_for(lambda: gauge(server, PUBLIC_UNITS) == 0)
        assert httpx.get(server.url + CONSENT_PATH).text == "this operator consents\n"
