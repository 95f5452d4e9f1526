from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import pytest

from bench import (
    harness,
    sharing,
    sharing_attack,
    sharing_kept,
    sharing_server,
    sharing_trace,
)
from bench.harness import Figure
from bench.sharing_replay import WINDOWS, Player, Replay, Sample, take_turns, window_rates
from bench.sharing_target import Counted, Target
from bench.sharing_trace import FULL, MEASURED_FROM, PAGE, Ask, K, Shape, Texts
from kvkeep.audit import Options, Report, audit
from kvkeep.audit.findings import Outcome
from kvkeep.config import DEMO_MODEL, Settings
from kvkeep.engine.pinning import pinned_prompts
from kvkeep.errors import ConfigError
from kvkeep.fitting import UNSAFE_POLICIES
from kvkeep.models.text import TextModel
from kvkeep.sharing.monitor import MonitorLimits
from kvkeep.types import PAGE_TOKENS
from tests.audit.fakes import CAST, URL, FakeServer


def test_the_committed_trace_is_what_its_maker_makes() -> None:
    assert sharing_trace.read() == sharing_trace.make(FULL)


def test_the_trace_is_as_the_shape_says() -> None:
    trace = sharing_trace.read()
    assert {ask.tenant for ask in trace} == set(range(32))
    assert {ask.epoch for ask in trace} == set(range(1, FULL.epochs + 1))
    assert all(64 <= ask.suffix_tokens <= 512 for ask in trace)
    for template in range(8):
        voters = {a.tenant for a in trace if a.epoch == 1 and a.template == template}
        assert len(voters) >= K + 1
    late = [ask.template for ask in trace if ask.epoch >= MEASURED_FROM]
    share = late.count(0) / len(late)
    assert share == pytest.approx(1 / sum(1 / rank for rank in range(1, 9)), abs=0.08)


def test_what_isolation_needs_counts_a_template_once_for_each_tenant() -> None:
    shape = Shape(template_tokens=2 * PAGE, answer_tokens=10)
    trace = [Ask(1, 0, 0, 54), Ask(1, 0, 0, 55), Ask(1, 1, 0, 54)]
    assert sharing_trace.isolation_pages(trace, shape) == 2 * 2 + (1 + 2 + 1)


def test_prompts_have_the_length_of_the_trace_and_share_their_template_alone() -> None:
    shape = Shape(template_tokens=128)
    texts = Texts(TextModel.load(DEMO_MODEL), shape)
    one, other = texts.prompt(0, Ask(1, 0, 3, 70)), texts.prompt(1, Ask(1, 1, 3, 70))
    assert len(one) == len(other) == 198
    assert one[:128] == other[:128]
    assert one[128:] != other[128:]
    assert one[:64] != texts.prompt(2, Ask(1, 0, 4, 70))[:64]


def test_every_policy_of_the_server_is_measured_as_it_asks_to_be_told() -> None:
    known = {*get_args(Settings.model_fields["share"].annotation)}
    assert {policy.name for policy in sharing_server.POLICIES} == known
    unsafe = {p.name for p in sharing_server.POLICIES if p.flags == sharing_server.UNSAFE}
    assert unsafe == {*UNSAFE_POLICIES}


def played(ttft_s: float, tokens: int = 100, hit_ratio: float = 0.5) -> Replay:
    samples = tuple(Sample(ttft_s, tokens, 10.0 + i) for i in range(1, 25))
    return Replay(samples, window_rates(samples, 10.0), hit_ratio, 0.0)


def by_name(figures: list[Figure]) -> dict[str, float]:
    return {figure.name: figure.estimate.median for figure in figures}


def test_policies_are_compared_request_by_request() -> None:
    found = {
        "isolate": played(0.3, tokens=50),
        "selective": replace(played(0.21, tokens=200), hit_ratio=0.76, scan_share=0.01),
        "share_all": replace(played(0.2), hit_ratio=0.8),
    }
    assert by_name(sharing.ratios(found)) == {
        "ttft_overhead_selective_vs_share_all": pytest.approx(0.05),
        "ttft_overhead_isolate_vs_share_all": pytest.approx(0.5),
        "throughput_selective_vs_isolate": pytest.approx(4.0),
        "hit_ratio_selective_over_share_all": pytest.approx(0.95),
        "scan_share": 0.01,
    }
    assert by_name(sharing.ratios({"isolate": found["isolate"]})) == {}
    told = sharing.ratios({"selective": found["selective"]}, sharing.DEMO)
    assert [(figure.name, figure.goal) for figure in told] == [("scan_share_demo_model", None)]


def test_a_window_rate_is_tokens_over_its_time() -> None:
    assert played(0.1).rates == pytest.approx([100.0] * WINDOWS)


class Counting:
    """A server that scans ten seconds of processor time while others are asked, one while it is."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name
        self.asked = 0

    def counted(self) -> Counted:
        others = sum(name != self.name for name in self.log)
        return Counted(self.asked, 2 * self.asked, 0.1 * self.asked, self.asked + 10 * others)


class Scripted(Player):
    """Answers at once, and notes whom it was and what was asked."""

    def __init__(self, server: Counting) -> None:
        self.server = server
        self.target = cast("Target", server)
        self.numbers: list[int] = []

    async def play(self, numbered: Sequence[tuple[int, Ask]]) -> list[Sample]:
        self.server.log.append(self.server.name)
        self.server.asked += len(numbered)
        self.numbers += [number for number, _ in numbered]
        return [Sample(float(number), 100, 0.0) for number, _ in numbered]


def test_servers_take_turns_with_the_same_requests() -> None:
    trace = sharing_trace.make(FULL)
    log: list[str] = []
    players = {name: Scripted(Counting(log, name)) for name in ("a", "b", "c")}
    found = take_turns(players, trace)
    first = next(i for i, ask in enumerate(trace) if ask.epoch == MEASURED_FROM)
    for name, one in found.items():
        assert players[name].numbers == [*range(first, len(trace))]
        assert [sample.ttft_s for sample in one.samples] == [*range(first, len(trace))]
        assert (len(one.rates), one.hit_ratio) == (WINDOWS, 0.5)
        assert one.scan_share == pytest.approx(0.1), "of the time of its own windows"
    turns = ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert turns == ["abc", "bca", "cab"] * (WINDOWS // 3)


def test_audits_stay_below_what_the_monitor_takes_for_probing_and_the_control_reaches_k() -> None:
    assert MonitorLimits().tiny_tokens < sharing_attack.ANSWER_TOKENS
    assert len(sharing_attack.CAST) - 1 < K, "the attacker aside"
    assert len(sharing_attack.CONTROL_CAST) - 1 == K
    assert sum(sharing_attack.CONTROLLED.values()) < 0.5, "most of the pool is left to be public"


def test_what_a_turn_of_every_channel_plants_stays_until_it_is_asked_for() -> None:
    own = Settings().share_pool  # what tenants' shares are made of is the rest
    room = sharing_attack.AUDIT_PAGES * (1 - own)
    pages = sharing_attack.PROMPT_TOKENS // PAGE_TOKENS + 1
    turn = len(sharing_attack.INDEX_CHANNELS) * sharing_attack.BATCH * pages
    assert sharing_attack.CAST["victim"] * room > turn
    controlled = sharing_attack.CONTROL_CAST["victim"] * room
    assert controlled > 2 * sharing_attack.CONTROL_BATCH * pages


def audited(leak: str) -> Report:
    server = FakeServer(leaks=frozenset({leak}))
    options = Options(
        URL,
        CAST,
        channels=("ttft", "collision"),
        margin=0.2,
        seconds=1e6,
        per_second=1e6,
        seed=2,
        prompt_tokens=128,
        max_prompt_tokens=128,
    )
    clock = server.time.clock()
    return asyncio.run(audit(options, transport=server.transport(), clock=clock))


@pytest.mark.parametrize(("leak", "policy"), [("ttft", "share_all"), ("", "isolate")])
def test_the_worst_channel_counts(leak: str, policy: str) -> None:
    report = audited(leak)
    figures = by_name(sharing_attack.attack_figures(policy, [report]))
    worst = figures[f"attack_auc_private_{policy}"]
    if policy == "share_all":
        assert worst > 0.95
        assert len(figures) == 1
    else:
        assert abs(worst - 0.5) < 0.2
        assert figures["attack_auc_private_isolate_halfwidth"] <= 0.2
        assert figures["attack_auc_private_isolate_holds_chance"] == 1.0


@pytest.mark.parametrize(
    ("policy", "outcome", "holds"),
    [
        ("isolate", "void", 0.0),
        ("isolate", "skipped", 0.0),
        ("vllm_salted", "void", 0.0),
        ("vllm_salted", "skipped", 1.0),
    ],
)
def test_a_channel_that_saw_nothing_is_not_said_to_hold_chance(
    policy: str, outcome: Outcome, holds: float
) -> None:
    report = audited("")
    first, last = report.channels
    unseen = replace(last, outcome=outcome, evidence=None, pairs=())
    name = f"attack_auc_private_{policy}_holds_chance"
    seen, one_blind = (
        by_name(sharing_attack.attack_figures(policy, [replace(report, channels=channels)]))
        for channels in ((first, last), (first, unseen))
    )
    assert (seen[name], one_blind[name]) == (1.0, holds)


def test_an_audit_that_ended_is_made_once_for_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = [audited("ttft"), audited("")]
    made: list[Report] = []

    def measure() -> Report:
        made.append(reports[len(made)])
        return made[-1]

    monkeypatch.setattr(harness, "commit", lambda: "a" * 40)
    found = [sharing_kept.kept("selective-1", measure, tmp_path) for _ in range(2)]
    assert found == [reports[0]] * 2
    assert len(made) == 1
    monkeypatch.setattr(harness, "commit", lambda: "b" * 40 + "-dirty")
    assert sharing_kept.kept("selective-1", measure, tmp_path) == reports[1]
    assert not (tmp_path / ("b" * 40 + "-dirty")).exists()


def test_pages_have_the_demo_models_size() -> None:
    assert sharing_server.page_bytes(DEMO_MODEL) == 64 * 4 * 2 * 64 * 2 * 2


def test_what_an_operator_pins_is_the_traces_templates(tmp_path: Path) -> None:
    text = TextModel.load(DEMO_MODEL)
    texts = Texts(text, FULL)
    file = sharing_server.pinned_file(tmp_path / "pins.toml", texts.declared)
    pinned = pinned_prompts(file, text)
    assert len(pinned) == FULL.templates
    for template, found in enumerate(pinned):
        ids = texts.prompt(0, Ask(1, 0, template, 64))[: FULL.template_tokens]
        assert found[: FULL.template_tokens] == ids
        assert len(found) // PAGE == FULL.template_tokens // PAGE, "no page more"


def test_parts_and_policies_can_be_measured_alone() -> None:
    def names(*only: str, quick: bool = False) -> tuple[list[str], list[str]]:
        parts, policies = sharing.asked(harness.Options(quick=quick, only=only))
        return parts, [policy.name for policy in policies]

    everything = [policy.name for policy in sharing_server.POLICIES]
    assert names() == (["replay", "shapes", "audit", "control"], everything)
    assert names(quick=True)[0] == ["replay", "audit"], "a quick run ends within a minute"
    assert names("audit", "selective") == (["audit"], ["selective"])
    assert names(quick=True)[1] == [n for n in everything if n in sharing_server.QUICK_POLICIES]
    with pytest.raises(ConfigError, match="no part 'nothing'"):
        names("nothing")
