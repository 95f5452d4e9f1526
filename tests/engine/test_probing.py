"""Tenants that probe a whole engine: what the monitor says, and who feels it."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import HTTPServer
from pathlib import Path

from kvkeep.engine.api import SamplingParams
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.engine import EngineCore
from kvkeep.eviction.policy import KeepAll
from kvkeep.models.text import TextModel
from kvkeep.quant.codec import Float
from kvkeep.sharing.audit import Alert
from kvkeep.sharing.members import Directory, Member
from kvkeep.sharing.monitor import Monitor, MonitorLimits
from kvkeep.sharing.pins import Pins
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.promotion import Promotion, PromotionParts
from kvkeep.sharing.state import NoStore
from kvkeep.sharing.votes import PromotionLimits
from kvkeep.shield.policy import NoShield
from tests.engine.test_sharing import (
    NAMES,
    TEMPLATE,
    ClearsAll,
    built,
    cached,
    end_epochs,
    send,
    terms,
)
from tests.engines import core_for
from tests.sharing.test_audit import Receiver

TINY = SamplingParams(max_tokens=1, temperature=0.0)
WORDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


class Watched:
    """An engine whose monitor hears the time from a test, and what it has said."""

    def __init__(self, model: Path, limits: MonitorLimits | None = None) -> None:
        self.alerts: list[Alert] = []
        self.now = 1000.0
        directory = Directory()
        directory.set({name: Member(name, "all") for name in NAMES})
        text = TextModel.load(model)
        monitor = Monitor(limits, self, lambda: self.now)
        parts = PromotionParts(
            AtLeast(2), directory, text.decode, ClearsAll(), NoStore(), monitor, Pins()
        )
        self.policy = Promotion(parts, PromotionLimits(), threaded=True, clock=lambda: 0.0)
        techniques = Techniques(Float(), NoShield(), KeepAll())
        self.core: EngineCore = core_for(
            model,
            parts=Parts(techniques=techniques, policy=self.policy),
            tenants=dict.fromkeys(NAMES, 0.1),
            chunk_tokens=256,
        )
        self.core.set_tenants(dict.fromkeys(NAMES, 0.1), terms())
        self.prompt = text.encode(TEMPLATE)[:600]
        self.other = self.prompt[::-1]
        for name in "abc":
            send(self.core, name, self.prompt)
            send(self.core, name, self.other)
        end_epochs(self.core)

    def send(self, alert: Alert) -> None:
        """Take an alert, as a sink does."""
        self.alerts.append(alert)

    def ask(self, prompt: Sequence[int], *, params: SamplingParams = TINY, **changes: bool) -> None:
        """Ask as tenant `x`."""
        send(self.core, "x", prompt, params=params, **changes)

    def said(self) -> list[tuple[str, str, str]]:
        return [(alert.tenant, alert.rule, alert.action) for alert in self.alerts]


def guess(prompt: Sequence[int], i: int) -> list[int]:
    """Return a public prefix with one guess of how it goes on."""
    return [*prompt[:512], *[300 + i] * 70]


def test_guessing_how_a_public_prefix_goes_on_ends_in_the_tenants_own_scope(
    tiny: dict[str, Path],
) -> None:
    """Warned first; alone for an hour the second time; nobody else loses anything."""
    world = Watched(tiny["llama"])
    for i in range(8):
        world.ask(guess(world.prompt, i))
    assert world.alerts == []
    world.ask(guess(world.prompt, 8))
    assert world.said() == [("x", "branch fan-out", "notify")]
    for i in range(9):
        world.ask(guess(world.prompt, 100 + i))
    assert world.said()[1:] == [("x", "branch fan-out", "fall back")]
    assert cached(world.core, "x", world.other[:300]) == (0, 0), "alone"
    assert cached(world.core, "x", world.prompt)[0] == 512, "what it has sent itself"
    assert cached(world.core, "e", world.other) == (0, 512), "nobody else"
    end_epochs(world.core)
    assert world.policy.public_units == 4, "no page is demoted"
    world.now += 3601
    assert cached(world.core, "x", world.other)[1] > 0, "the hour is over"
    world.core.close()


def test_asking_for_one_token_of_what_is_public_is_probing(tiny: dict[str, Path]) -> None:
    world = Watched(tiny["llama"])
    for _ in range(40):
        world.ask(world.prompt[:520], store=False)
        world.now += 5
    assert ("x", "probe share", "notify") in world.said()
    assert not [alert for alert in world.alerts if alert.rule == "branch fan-out"]
    world.core.close()


def test_hitting_ever_more_that_is_public_is_probing(tiny: dict[str, Path]) -> None:
    world = Watched(tiny["llama"], MonitorLimits(novel_hits_per_hour=2))
    for prompt in (world.prompt[:300], world.prompt, world.prompt, world.other[:300]):
        assert world.alerts == []
        world.ask(prompt, params=WORDY)
    assert world.said() == [("x", "novel public hits", "notify")]
    world.core.close()


def test_a_page_that_one_tenant_hits_often_is_told_and_stays(tiny: dict[str, Path]) -> None:
    world = Watched(tiny["llama"])
    for wait in (*[0] * 29, 11, 0):
        world.now += wait
        world.ask(world.prompt[:520], params=WORDY, store=False)
    assert {(a.rule, a.action) for a in world.alerts} == {
        ("reuse diversity", "notify"),
        ("entropy", "notify"),
    }
    assert cached(world.core, "x", world.prompt) == (0, 512)
    world.core.close()


def test_an_honest_tenant_hears_nothing(tiny: dict[str, Path]) -> None:
    """It answers many people under one template, and says yes or no to a few."""
    world = Watched(tiny["llama"])
    for i in range(60):
        world.ask(guess(world.prompt, i), params=TINY if i % 3 == 0 else WORDY)
        world.now += 2
    assert world.alerts == []
    world.core.close()


def test_what_the_operator_pinned_may_be_asked_for_at_any_pace(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    file, audit = tmp_path / "pins.toml", tmp_path / "audit.jsonl"
    file.write_text(f'[[prefix]]\ntext = "{TEMPLATE}"\n')
    core, prompt = built(tiny["llama"], pinned=str(file), audit_log=str(audit))
    for i in range(45):
        send(core, "x", guess(prompt, i), params=TINY, store=False)
    assert core.stats().sharing.alerts == ()
    assert audit.read_bytes() == b""
    core.close()


def test_the_operator_reads_who_probes_and_nothing_of_what(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    """In the audit log and at the webhook: names and numbers, no text, no token, no page."""
    audit = tmp_path / "audit.jsonl"
    bodies: list[bytes] = []
    handler = type("Handler", (Receiver,), {"bodies": bodies})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        hook = f"http://127.0.0.1:{http.server_port}/"
        core, prompt = built(tiny["llama"], k=2, audit_log=str(audit), webhook=hook)
        for name in "abc":
            send(core, name, prompt)
        end_epochs(core)
        for _ in range(40):
            send(core, "x", prompt[:520], params=TINY, store=False)
        assert core.stats().sharing.alerts == (("probe share", "notify", 1),)
        webhook = core.sharing._webhook
        assert webhook is not None
        webhook.flush()
        core.close()
        http.shutdown()
        thread.join()
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert lines == [json.loads(body) for body in bodies]
    assert [set(line) for line in lines] == [{"time", "tenant", "rule", "action", "value", "limit"}]
    assert (lines[0]["tenant"], lines[0]["rule"], lines[0]["value"]) == ("x", "probe share", 1.0)


def test_what_others_do_brings_nobody_nearer_to_a_limit(tiny: dict[str, Path]) -> None:
    world = Watched(tiny["llama"])
    for i in range(20):
        for name in NAMES[:3]:
            send(world.core, name, guess(world.prompt, i), params=TINY)
    world.alerts.clear()
    for i in range(8):
        world.ask(guess(world.prompt, i))
    assert world.alerts == []
    world.core.close()
