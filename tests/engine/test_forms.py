"""Forms of requests: the least one at once, the floor's once it is known, if the share holds it."""

from __future__ import annotations

import logging

import pytest

from kvkeep.cache.caches import Caches
from kvkeep.engine.api import SamplingParams
from kvkeep.engine.choosing import controller_of
from kvkeep.engine.forms import Forms
from kvkeep.engine.guard import Guard, GuardLimits
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from kvkeep.quant.controller import ByLength, ByLink, Fixed
from kvkeep.sharing.policy import ShareNothing
from kvkeep.sharing.state import NoStore
from tests.cache.player import make_manager
from tests.engines import request


def forms_of(kept_pages: int = 40, names: tuple[str, ...] = ("small", "middle", "kept")) -> Forms:
    managers = {name: make_manager(60) for name in names}
    caches = Caches(managers, ShareNothing())
    caches.set_shares({"a": 1.0})
    managers["kept"].set_quotas({"a": kept_pages}, 0)
    guard = Guard(GuardLimits(1.0, 1, 0.1), "kept", 2, NoStore())
    guard.asleep = False
    return Forms(Fixed(names), guard, caches, may_code=lambda _: True)


def asked(tokens: int, **changes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": tokens, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("max_tokens", "limit", "reserved"), [(0, 1, 100), (9, 9, 109), (10**6, 512, 612)]
)
def test_a_shadow_is_for_the_prompt_and_so_much_of_the_answer(
    max_tokens: int, limit: int, reserved: int
) -> None:
    sample = forms_of().enter(request([1] * 100, asked(max_tokens))).sample
    assert sample is not None
    assert (sample.limit, sample.reserved_tokens, sample.form) == (limit, reserved, "kept")


@pytest.mark.parametrize(
    ("tokens", "params"),
    [(2600, asked(9)), (2500, asked(100)), (9, asked(9, use_beam_search=True, n=2))],
    ids=["prompt", "answer", "beams"],
)
def test_what_cannot_carry_a_shadow_is_counted(tokens: int, params: SamplingParams) -> None:
    forms = forms_of()
    assert forms.enter(request([1] * tokens, params)).sample is None
    assert forms.guard.stats()[0].unshadowed == 1


def test_what_cannot_drift_is_not_drawn() -> None:
    forms = forms_of(names=("kept",))
    assert forms.enter(request([1], asked(9))) == (0, None)
    assert forms.guard.stats() == ()


def test_a_request_takes_the_form_with_the_most_bits_that_fits() -> None:
    forms = forms_of(kept_pages=4)
    spec, long = request([1] * 100, asked(9)), request([1] * 300, asked(9))
    assert [forms._fitting(spec, floor) for floor in range(3)] == ["small", "middle", "kept"]
    assert [forms._fitting(long, floor) for floor in range(3)] == ["small", "middle", "middle"]


def test_a_configured_link_enters_the_choice_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = ("k4v2", "kept")
    options = EngineOptions(model="", kv="auto", kv_auto_tokens=999)
    assert controller_of(options, names, 100.0) == ByLength(names, 999)
    slow = EngineOptions(model="", kv="auto", kv_auto_tokens=999, kv_auto_link_bytes_per_s=1e5)
    with caplog.at_level(logging.INFO, "kvkeep.engine.choosing"):
        chooses = controller_of(slow, names, 100.0)
    assert chooses == ByLink(ByLength(names, 999), 100.0, 1e5, 0.1)
    assert "prompts of more than 100 tokens are coded" in caplog.text
    assert controller_of(EngineOptions(model=""), ("float",), 100.0) == Fixed(("float",))


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(model="", kv="k2v2", kv_auto_link_bytes_per_s=1e6),
        EngineOptions(model="", kv="auto", kv_auto_link_bytes_per_s=0.0),
        EngineOptions(model="", kv="auto", kv_auto_link_bytes_per_s=1e6, kv_auto_link_wait_s=-1.0),
    ],
)
def test_a_link_that_cannot_enter_the_choice_is_refused(options: EngineOptions) -> None:
    with pytest.raises(ConfigError, match="kv_auto_link_bytes_per_s"):
        controller_of(options, ("k4v2", "kept"), 100.0)
