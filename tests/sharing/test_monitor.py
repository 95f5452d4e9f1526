from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from kvkeep.sharing.audit import Alert
from kvkeep.sharing.monitor import Monitor, MonitorLimits, reuse_diversity, spread
from kvkeep.types import Access

PAGE = b"page"


class Sink:
    def __init__(self) -> None:
        self.alerts: list[Alert] = []

    def send(self, alert: Alert) -> None:
        self.alerts.append(alert)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(**limits: int) -> tuple[Monitor, Sink, Clock]:
    sink, clock = Sink(), Clock()
    return Monitor(MonitorLimits(**limits), sink, clock), sink, clock


def probe(monitor: Monitor, page: bytes = PAGE, branch: bytes = b"", answer: int = 1) -> None:
    monitor.observe(Access("eve", 0, 100, 0, (page,), branch, answer, page), "eve")


def novel(monitor: Monitor, i: int) -> None:
    probe(monitor, page=b"%d" % i, answer=50)


def fan(monitor: Monitor, i: int) -> None:
    """Guess how a public prefix goes on, the prefix being among its own pages."""
    monitor.observe(Access("eve", 0, 100, 64, (), b"%d" % i, 1, PAGE), "eve")


def often(monitor: Monitor, i: int) -> None:
    probe(monitor)


@pytest.mark.parametrize(
    ("act", "rule", "times"),
    [(novel, "novel public hits", 201), (fan, "branch fan-out", 9), (often, "probe share", 40)],
)
def test_a_rule_warns_first_and_then_the_tenant_is_alone_for_an_hour(
    act: Callable[[Monitor, int], None], rule: str, times: int
) -> None:
    monitor, sink, clock = make()
    for i in range(times):
        assert not [a for a in sink.alerts if a.rule == rule]
        act(monitor, i)
    assert [(a.tenant, a.action) for a in sink.alerts if a.rule == rule] == [("eve", "notify")]
    assert not monitor.falls_back("eve")
    for i in range(times):
        act(monitor, 1000 + i)
    assert [a.action for a in sink.alerts if a.rule == rule] == ["notify", "fall back"]
    assert monitor.falls_back("eve")
    assert not monitor.falls_back("alice")
    monitor.forget("eve")
    assert monitor.falls_back("eve"), "a purge ends no fall-back"
    clock.now += 3601
    assert not monitor.falls_back("eve")
    assert monitor.alerts[rule, "fall back"] == 1


def test_an_honest_tenant_hears_nothing() -> None:
    monitor, sink, clock = make()
    for i in range(2000):
        clock.now += 20
        answer = 200 if i % 3 else 1
        public = (b"%d" % (i % 8),) if i % 2 else ()
        monitor.observe(Access("alice", i, 900, 0, public, b"%d" % i, answer, PAGE), "alice")
        monitor.observe(Access("unknown", i, 900, 0, (), b"", None), "unknown")
    assert sink.alerts == []
    monitor.forget("nobody")


def test_branches_are_forgotten_after_their_window() -> None:
    monitor, sink, clock = make(probe_prompts=10_000)
    for i in range(50):
        clock.now += 11
        probe(monitor, page=b"%d" % (i % 2), branch=b"%d" % i)
    assert sink.alerts == []


def test_old_novel_hits_do_not_count() -> None:
    monitor, sink, clock = make()
    for i in range(400):
        clock.now += 30
        novel(monitor, i)
    assert sink.alerts == []


def test_signals_of_pages_are_told_and_nothing_follows() -> None:
    monitor, sink, clock = make(probe_prompts=10_000)
    for _ in range(30):
        probe(monitor, answer=50)
    clock.now += 11
    probe(monitor, answer=50)
    assert {(a.rule, a.action) for a in sink.alerts} == {
        ("reuse diversity", "notify"),
        ("entropy", "notify"),
    }
    assert not monitor.falls_back("eve")
    clock.now += 11
    probe(monitor, answer=50)
    assert len(sink.alerts) == 2


def test_what_the_signals_are() -> None:
    assert reuse_diversity(Counter(a=5, b=5)) == 0.2
    assert spread(Counter(a=5, b=5)) == pytest.approx(1.0)
    assert spread(Counter(a=9)) == 0.0
