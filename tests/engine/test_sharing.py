"""The policy inside a whole engine: who is served from whose pages, and what that shows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from kvkeep.engine.api import Purged, SamplingParams, TenantTerms
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions, SharingOptions
from kvkeep.engine.pinning import pinned_prompts
from kvkeep.engine.sharing import EpochTimer, Sharing
from kvkeep.errors import ConfigError
from kvkeep.eviction.policy import KeepAll
from kvkeep.models.text import TextModel
from kvkeep.quant.codec import Float
from kvkeep.sharing.policies.isolate import ShareNothing
from kvkeep.sharing.policies.pinned import SharePinned
from kvkeep.sharing.policies.safekv import SafeKV
from kvkeep.sharing.policies.salt import ShareBySalt
from kvkeep.sharing.policies.share_all import ShareAll
from kvkeep.sharing.promotion import Promotion
from kvkeep.shield.policy import NoShield
from kvkeep.types import SharingPolicy
from tests.engines import GREEDY, drive, request, tokens

NAMES = ("a", "b", "c", "d", "e", "x")
TEMPLATE = "You answer questions about the weather in short and plain sentences. " * 40


def no_text(ids: Sequence[int]) -> str:
    return ""


class ClearsAll:
    version = "all"

    def first_doubt(self, text: str) -> int | None:
        return None


def built(model: Path, **options: object) -> tuple[EngineCore, list[int]]:
    """Return an engine with six tenants of one group, and a prompt of more than 512 tokens."""
    share = SharingOptions(**{"policy": "selective", "units_per_day": 64} | options)  # type: ignore[arg-type]
    engine = EngineOptions(model=str(model), threads=2, kv_cache_bytes=64 << 20, share=share)
    techniques = Techniques(Float(), NoShield(), KeepAll())
    core = build_core(engine, parts=Parts(techniques=techniques, inspector=ClearsAll()))
    core.set_tenants(dict.fromkeys(NAMES, 0.1), terms())
    return core, TextModel.load(model).encode(TEMPLATE)[:600]


def terms(**changes: TenantTerms) -> dict[str, TenantTerms]:
    return {name: TenantTerms(voter=name, group="all") for name in NAMES} | changes


def end_epochs(core: EngineCore, count: int = 2) -> None:
    """End epochs, the scanning thread having caught up."""
    policy = core.sharing.policy
    for i in range(count):
        if isinstance(policy, Promotion):
            wait_for_scans(policy)
        core.end_epoch(60.0 * i)


def wait_for_scans(policy: Promotion) -> None:
    for _ in range(1000):
        if not any(n > 0 for n in policy.scans._open.values()):
            return
        threading.Event().wait(0.005)
    raise AssertionError("the scans do not end")


def send(core: EngineCore, name: str, prompt: Sequence[int], **changes: object) -> list[int]:
    """Send a prompt; return its answer."""
    ask = request(prompt, GREEDY, id=f"{name}-{core.counters.cache_queries}", tenant=name)
    if changes:
        ask = msgspec.structs.replace(ask, **changes)
    return tokens(drive(core, [ask])[ask.id])


def cached(core: EngineCore, name: str, prompt: Sequence[int]) -> tuple[int, int]:
    """Return what a tenant is told to have found, and what was saved beside it."""
    before = core.counters.saved_tokens
    chunks = drive(core, [request(prompt, GREEDY, id="probe", tenant=name)])["probe"]
    return chunks[0].cached_tokens, core.counters.saved_tokens - before


def test_what_k_others_sent_saves_time_and_changes_nothing_else(tiny: dict[str, Path]) -> None:
    core, prompt = built(tiny["llama"])
    cold = send(core, "a", prompt)
    for name in "bcd":
        assert send(core, name, prompt) == cold
    assert cached(core, "x", prompt[:400]) == (0, 0)
    end_epochs(core)
    assert cached(core, "e", prompt) == (0, 512)
    assert send(core, "e", prompt) == cold
    told, saved = cached(core, "x", prompt)
    assert (told, saved) == (400 // 64 * 64 + 400 % 64, 512 - 400), "its own count, no more"
    stats = core.stats().sharing
    assert (stats.policy, stats.public_units, stats.public_pages) == ("selective", 2, 8)
    assert stats.saved_tokens == 512 + 112
    assert dict(stats.scanned_bytes)["a"] == 2048
    core.close()


def test_a_running_request_shows_its_pages_to_its_own_tenant(tiny: dict[str, Path]) -> None:
    """As a computed prompt would, once its first step is done."""
    core, prompt = built(tiny["llama"])
    for name in "abcd":
        send(core, name, prompt)
    end_epochs(core)
    core.submit(request(prompt[:520], GREEDY, id="first", tenant="x"))
    core.step()
    core.submit(request(prompt[:520], GREEDY, id="second", tenant="x"))
    chunks = drive(core, [])
    assert chunks["second"][0].cached_tokens == 512
    core.close()


def test_replies_keep_the_order_of_their_requests(tiny: dict[str, Path]) -> None:
    """A prompt that others made fast does not overtake one that was sent before it."""
    core, prompt = built(tiny["llama"])
    for name in "abcd":
        send(core, name, prompt)
    end_epochs(core)
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    other = list(reversed(prompt))
    core.submit(request(other[:512], one, id="slow", tenant="x"))
    core.submit(request(prompt[:512], one, id="fast", tenant="x"))
    order = []
    while not core.idle():
        order += [output.request_id for output in core.step()]
    assert order == ["slow", "fast"]
    core.close()


def test_nothing_is_kept_of_a_request_that_says_so(tiny: dict[str, Path]) -> None:
    core, prompt = built(tiny["llama"])
    first = send(core, "a", prompt, store=False)
    assert core.stats().tenants[0].used_pages == 0
    assert cached(core, "a", prompt) == (0, 0)
    for name in "bcd":
        send(core, name, prompt, store=False)
    end_epochs(core)
    assert cached(core, "x", prompt) == (0, 0), "nor does it count"
    core.set_tenants(
        dict.fromkeys(NAMES, 0.1),
        terms(x=TenantTerms(voter="x", group="all", store="never")),
    )
    core.purge("x")
    assert send(core, "x", prompt) == first
    assert cached(core, "x", prompt) == (0, 0)
    core.close()


def test_pages_go_when_their_tenants_time_is_over(tiny: dict[str, Path]) -> None:
    core, prompt = built(tiny["llama"])
    core.set_tenants(
        dict.fromkeys(NAMES, 0.1), terms(a=TenantTerms(voter="a", ttl_s=100.0, store="memory"))
    )
    core.end_epoch(1000.0)
    send(core, "a", prompt)
    send(core, "b", prompt)
    core.end_epoch(1060.0)
    assert core.stats().tenants[0].used_pages > 0
    core.end_epoch(1120.0)
    assert core.stats().tenants[0].used_pages == 0
    assert core.stats().tenants[1].used_pages > 0
    core.close()


def test_a_purge_tells_what_went_and_ends_votes(tiny: dict[str, Path]) -> None:
    core, prompt = built(tiny["llama"])
    for name in "abcd":
        send(core, name, prompt)
    end_epochs(core)
    assert core.purge("a") == Purged(pages=10, votes=2)
    assert core.purge("a") == Purged(pages=0, votes=0)
    core.close()


@pytest.mark.parametrize(
    "change",
    [None, TenantTerms(voter="a"), TenantTerms(voter="a", group="all", contribute=False)],
    ids=["removed", "left the group", "contributes no more"],
)
def test_votes_of_who_left_do_not_count(tiny: dict[str, Path], change: TenantTerms | None) -> None:
    core, prompt = built(tiny["llama"])
    for name in "abc":
        send(core, name, prompt)
    end_epochs(core)
    left = dict.fromkeys(NAMES, 0.1)
    if change is None:
        del left["a"]
    core.set_tenants(left, terms() if change is None else terms(a=change))
    send(core, "d", prompt)
    end_epochs(core)
    assert cached(core, "x", prompt) == (0, 0)
    core.close()


def test_pinned_prefixes_are_there_before_anybody_asks(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "pins.toml"
    file.write_text(f'[[prefix]]\ntext = "{TEMPLATE}"\n')
    core, prompt = built(tiny["llama"], policy="pinned", pinned=str(file))
    told, saved = cached(core, "x", prompt)
    assert (told, saved) == (576, 0), "counted: the operator said so"
    core.end_epoch(60.0)
    assert cached(core, "a", prompt) == (576, 0)
    assert core.stats().sharing.policy == "pinned"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "can't read"),
        ("[[prefix", "no TOML"),
        ("", "no \\[\\[prefix\\]\\]"),
        ("[[prefix]]\ntext = 3", "text or messages"),
        ('[[prefix]]\ntext = "a"\nname = "b"', "text or messages"),
        ('[[prefix]]\nmessages = [{role = "user"}]', "text or messages"),
        (f'[[prefix]]\ntext = "{TEMPLATE * 40}"', "prefix 1"),
    ],
)
def test_a_bad_file_of_pins_is_one_sentence(
    tiny: dict[str, Path], tmp_path: Path, content: str | None, word: str
) -> None:
    file = tmp_path / "pins.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"share_pinned.*{word}"):
        built(tiny["llama"], policy="pinned", pinned=str(file))


def test_a_conversation_is_pinned_as_the_template_renders_it(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "pins.toml"
    file.write_text('[[prefix]]\nmessages = [{role = "system", content = "be brief"}]\n')
    text = TextModel.load(tiny["llama"])
    wanted = text.apply_chat(
        [{"role": "system", "content": "be brief"}], add_generation_prompt=False
    )
    assert pinned_prompts(file, text) == [wanted]
    plain = TextModel(Tokenizer.from_file(str(tiny["llama"] / "tokenizer.json")), None, {})
    with pytest.raises(ConfigError, match=r"share_pinned: .*prefix 1: .*chat template"):
        pinned_prompts(file, plain)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("isolate", ShareNothing),
        ("selective", Promotion),
        ("dp", Promotion),
        ("pinned", SharePinned),
        ("salt", ShareBySalt),
        ("safekv", SafeKV),
        ("share_all", ShareAll),
    ],
)
def test_every_policy_has_its_name(policy: str, kind: type[SharingPolicy], tmp_path: Path) -> None:
    options = SharingOptions(
        policy=policy,  # type: ignore[arg-type]
        state=str(tmp_path / "votes"),
        audit_log=str(tmp_path / "audit"),
        webhook="http://127.0.0.1:9/",
    )
    for _ in range(2):
        sharing = Sharing(options, no_text)
        assert isinstance(sharing.policy, kind)
        stats = sharing.stats(3, 0, 0)
        assert (stats.policy, stats.public_pages, stats.alerts_failed) == (policy, 3, 0)
        assert (stats.eps_per_day is not None) == (policy == "dp")
        sharing.close()


def test_a_log_of_alerts_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^share_audit_log: "):
        Sharing(SharingOptions(audit_log=str(tmp_path)), no_text)


def test_dp_draws_the_same_after_a_restart(tmp_path: Path) -> None:
    def key(state: Path | None) -> object:
        options = SharingOptions(policy="dp", state=None if state is None else str(state))
        policy = Sharing(options, no_text).policy
        assert isinstance(policy, Promotion)
        return policy._parts.rule

    assert key(tmp_path / "votes") == key(tmp_path / "votes")
    assert key(None) != key(None)


def test_a_timer_is_due_once_an_epoch() -> None:
    now = [0.0]
    timer = EpochTimer(60.0, lambda: now[0])
    assert (timer.left_s(), timer.due()) == (60.0, False)
    now[0] = 61.0
    assert timer.left_s() == 0.0
    assert (timer.due(), timer.due()) == (True, False)
    now[0] = 600.0
    assert (timer.due(), timer.due(), timer.left_s()) == (True, False, 60.0)
