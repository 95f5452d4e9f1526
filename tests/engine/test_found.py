"""What a tenant finds of its own prompts that run, or were ended: no sign of what others made fast.

The same is done with a prompt that is public and with one that nobody else has sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvkeep.engine.api import TenantTerms
from kvkeep.engine.engine import EngineCore
from kvkeep.models.text import TextModel
from tests.engine.test_sharing import TEMPLATE, built, cached, end_epochs, send, terms
from tests.engines import GREEDY, drive, request

LENGTH = 1100


def prompt_of(model: Path) -> list[int]:
    return TextModel.load(model).encode(TEMPLATE * 5)[:LENGTH]


def beside(core: EngineCore, prompt: Sequence[int]) -> int:
    """Return what a prompt finds that is sent while its equal is being computed."""
    core.submit(request(prompt, GREEDY, id="first", tenant="x"))
    core.step()
    core.submit(request(prompt, GREEDY, id="second", tenant="x"))
    return drive(core)["second"][0].cached_tokens


def at_once(core: EngineCore, prompt: Sequence[int]) -> int:
    """Return what one of two equal prompts finds that are sent together."""
    asked = [request(prompt, GREEDY, id=name, tenant="x") for name in ("first", "second")]
    return drive(core, asked)["second"][0].cached_tokens


def after_a_longer_one(core: EngineCore, prompt: Sequence[int]) -> int:
    """Return what a prompt finds whose first half is what another begins with."""
    other = [*prompt[: LENGTH // 2], *reversed(prompt)]
    core.submit(request(other[:LENGTH], GREEDY, id="first", tenant="x"))
    core.step()
    core.submit(request(prompt, GREEDY, id="second", tenant="x"))
    return drive(core)["second"][0].cached_tokens


def ended(core: EngineCore, prompt: Sequence[int]) -> int:
    """Return what a prompt finds of its equal that was ended before its first token."""
    core.submit(request([*prompt, 7, 7, 7], GREEDY, id="first", tenant="x"))
    core.cancel("first")
    core.step()
    return cached(core, "x", prompt)[0]


@pytest.mark.parametrize("act", [beside, at_once, after_a_longer_one, ended])
def test_counts_do_not_tell_what_is_public(
    tiny: dict[str, Path], act: Callable[[EngineCore, Sequence[int]], int]
) -> None:
    prompt = prompt_of(tiny["llama"])
    core, _ = built(tiny["llama"])
    for name in "abcd":
        send(core, name, prompt)
    end_epochs(core)
    found = [act(core, prompt), act(core, prompt[::-1])]
    assert core.counters.saved_tokens >= 512, "the first of them was public"
    assert found[0] == found[1]
    assert (found[0] == 0) == (act is ended)
    core.close()


def test_a_prompt_that_was_ended_before_its_first_token_leaves_nothing(
    tiny: dict[str, Path],
) -> None:
    """Neither pages nor a vote, for whoever reads what others share; others' parts stay."""
    prompt = prompt_of(tiny["llama"])
    core, _ = built(tiny["llama"])
    core.set_tenants(dict.fromkeys(terms(), 0.1), terms(a=TenantTerms(voter="a")))
    for name in "xa":
        core.submit(request(prompt, GREEDY, id="first", tenant=name))
        core.step()
        core.cancel("first")
        core.step()
    assert cached(core, "x", prompt) == (0, 0)
    assert cached(core, "a", prompt)[0] >= 256
    core.close()


def test_how_far_a_prompt_has_come_does_not_tell_the_load(tiny: dict[str, Path]) -> None:
    prompt = prompt_of(tiny["llama"])
    found = []
    for others in ("", "bcde"):
        core, _ = built(tiny["llama"])
        for name in others:
            core.submit(request(prompt, GREEDY, id=name, tenant=name))
        found.append(beside(core, prompt))
        core.close()
    assert found == [LENGTH // 64 * 64] * 2
