from __future__ import annotations

import json
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from kvkeep.audit import Options, Report, audit
from kvkeep.audit.channel import Facts, Observable, Pair
from kvkeep.audit.findings import Finding, conclude
from kvkeep.audit.page import html
from kvkeep.audit.sequential import Rates
from kvkeep.audit.svg import histogram
from tests.audit.fakes import ATTACKER, CAST, URL, VICTIM, FakeServer

VOID_TAGS = {"meta", "br"}


class Checked(HTMLParser):
    """Holds that tags nest and that nothing is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.plots = 0
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href"}]
        self.plots += tag == "svg"
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def report(*leaks: str) -> tuple[Report, FakeServer]:
    server = FakeServer(leaks=frozenset(leaks))
    options = Options(
        URL,
        CAST,
        channels=("ttft", "cached_tokens", "no_key"),
        margin=0.2,
        seconds=1e6,
        per_second=1e6,
        seed=1,
        prompt_tokens=64,
        max_prompt_tokens=512,
    )
    found = await audit(options, transport=server.transport(), clock=server.time.clock())
    return found, server


async def test_the_page_stands_alone_and_holds_every_plot() -> None:
    found, _ = await report("ttft")
    page, checked = html(found), Checked()
    checked.feed(page)
    assert checked.open == []
    assert checked.fetched == []
    assert checked.plots == 4  # two controls, two channels with pairs
    assert "leak" in page
    assert "told the attacker" in page
    assert "One tenant can learn what another one sent." in page


async def test_no_key_and_no_prompt_is_in_a_report() -> None:
    found, server = await report("cached_tokens")
    texts = html(found) + json.dumps(found.document()) + repr(found)
    assert VICTIM.key not in texts
    assert ATTACKER.key not in texts
    for body in server.bodies:
        assert " ".join(body["prompt"].split()[:4]) not in texts


async def test_the_document_is_json_of_what_was_found() -> None:
    found, _ = await report("cached_tokens")
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["verdict"] == "leak"
    by_name = {channel["channel"]: channel for channel in document["channels"]}
    assert by_name["cached_tokens"]["outcome"] == "leak"
    assert by_name["cached_tokens"]["auc"] == 1.0
    assert by_name["cached_tokens"]["ks_p"] < 1e-4
    assert by_name["ttft"]["outcome"] == "clean"
    assert by_name["ttft"]["auc_halfwidth"] <= 0.2
    assert len(by_name["ttft"]["hit"]) == by_name["ttft"]["pairs"]
    assert by_name["no_key"]["outcome"] == "skipped"
    assert "auc" not in by_name["no_key"]


@pytest.mark.parametrize(
    "pairs",
    [
        [Pair(1.0, 2.0), Pair(1.5, 2.5), Pair(1.2, 90.0)],
        [Pair(0.0, 0.0)],
        [Pair(-64.0, -0.0), Pair(-64.0, -0.0)],
    ],
)
def test_a_histogram_counts_every_sample(pairs: list[Pair]) -> None:
    drawn = ET.fromstring(histogram(pairs, "ms"))
    groups = drawn.findall("{*}g")
    assert len(groups) == 2
    for group in groups:
        heights = [float(bar.get("height", "")) for bar in group]
        assert heights
        assert all(0 < height <= 120 for height in heights)
    assert "ms" in "".join(drawn.itertext())


def finding(name: str, outcome: str, observable: Observable = Observable.TTFT) -> Finding:
    return Finding(Facts(name, "", observable), outcome, "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("channels", "verdict"),
    [
        ([finding("a", "clean"), finding("b", "clean")], "clean"),
        ([finding("a", "clean"), finding("b", "skipped")], "clean"),
        ([finding("a", "clean"), finding("b", "void")], "void"),
        ([finding("a", "clean"), finding("b", "void", Observable.ORDER)], "clean"),
        ([finding("b", "void", Observable.ORDER)], "void"),
        ([finding("a", "skipped")], "void"),
        ([finding("a", "leak"), finding("b", "void")], "leak"),
    ],
)
def test_the_verdict_over_channels(channels: list[Finding], verdict: str) -> None:
    assert conclude(channels, Rates(0.05, 0.05))[0] == verdict
