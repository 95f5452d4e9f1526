"""An engine that is led runs the shadows that it is told to, and says what they said once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from kvkeep.engine.api import GenerateRequest, SamplingParams
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.choosing import KEPT
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.guarded import Guarded, Said
from kvkeep.engine.led_guard import LedGuard
from kvkeep.engine.probes import PASSAGE_TOKENS
from kvkeep.eviction.corm import Corm
from kvkeep.eviction.policy import Evictor, KeepAll
from kvkeep.quant.codec import Codec
from kvkeep.quant.hack import Hack
from kvkeep.shield.policy import NoShield
from kvkeep.types import Layout
from tests.e2e.test_coded import everything_is_given_back, prompt_of
from tests.e2e.test_guard import Exact
from tests.e2e.test_guard_evict import SOUND
from tests.engines import core_for, drive, request

PARAMS = SamplingParams(max_tokens=8, temperature=0.8, seed=7, ignore_eos=True)


def led(model: Path, codec: Codec, evictor: Evictor | None = None) -> EngineCore:
    parts = Parts(techniques=Techniques(codec, NoShield(), evictor or KeepAll()))
    return core_for(model, parts=parts, max_num_seqs=8, guard_share=0.5, guard_led=True)


def asked(
    number: int, *, steps_back: int = 0, sampled: bool = True, params: SamplingParams = PARAMS
) -> GenerateRequest:
    guarded = Guarded(steps_back=steps_back, number=number, sampled=sampled)
    plain = request(prompt_of(200, number), params, id=str(number))
    return msgspec.structs.replace(plain, guarded=guarded)


def said(core: EngineCore) -> dict[str, tuple[Said, ...]]:
    return {one.request_id: one.said for one in core.forms.verdicts()}


def forms(core: EngineCore) -> dict[str, int]:
    return dict(core.stats().kv_chosen)


def compared(told: Iterable[Said]) -> list[tuple[int, int, float, bool]]:
    return [(one.compared, one.agreed, one.kl_nats, one.probe) for one in told]


def test_what_shadows_say_is_told_once_and_nothing_is_remembered(tiny: dict[str, Path]) -> None:
    core = led(tiny["qwen2"], Exact())
    drive(core, [asked(0), asked(1, sampled=False), request(prompt_of(200), PARAMS)])
    assert {name: compared(told) for name, told in said(core).items()} == {
        "0": [(8, 8, 0.0, False)]
    }
    assert said(core) == {}
    assert core.stats().guard == ()
    everything_is_given_back(core)


def test_the_form_is_the_one_that_is_named(tiny: dict[str, Path]) -> None:
    core = led(tiny["qwen2"], Hack(Layout.K2V2))
    drive(core, [asked(i, steps_back=i, sampled=False) for i in (0, 1, 1)])
    assert forms(core) == {"k2v2": 1, KEPT: 2}
    drive(core, [asked(3, steps_back=1)])
    assert said(core) == {"3": (Said(compared=0, agreed=0, recalled=0, forgotten=0, kl_nats=0.0),)}
    assert forms(core)[KEPT] == 3, "it is stored as its shadow would be"


def test_a_probe_is_told_with_its_request_and_both_once_both_have_ended(
    tiny: dict[str, Path],
) -> None:
    core = led(tiny["qwen2"], Exact(), Corm(SOUND))
    core.submit(asked(0))
    found: dict[str, tuple[Said, ...]] = {}
    while not core.idle():
        core.step()
        found |= said(core)
        assert not found or core.idle(), "the probe, which lasts longer, runs"
    rows = [(8, 8, 0.0, False), (PASSAGE_TOKENS, PASSAGE_TOKENS, 0.0, True)]
    assert compared(found["0"]) == rows
    assert found["0"][1].forgotten == 0
    drive(core, [asked(1, steps_back=2)])
    assert compared(said(core)["1"]) == [(0, 0, 0.0, False), (0, 0, 0.0, True)]


@pytest.mark.parametrize("why", ["beams", "large", "cancelled", "left"])
def test_whoever_asked_hears_of_those_that_say_nothing(tiny: dict[str, Path], why: str) -> None:
    core = led(tiny["qwen2"], Exact())
    beams = SamplingParams(max_tokens=4, n=2, use_beam_search=True, ignore_eos=True)
    if why == "large":
        core.caches.of(KEPT).set_quotas({"a": 2, "b": 2}, 0)
    core.submit(asked(0, params=beams if why == "beams" else PARAMS))
    for _ in range(3):
        core.step()
    if why == "cancelled":
        core.cancel("0")
    if why == "left":
        core.set_tenants({"b": 0.5})
    drive(core)
    found = said(core)
    assert list(found) == ["0"]
    assert all(one.compared == 0 for one in found["0"])
    assert isinstance(core.forms.guard, LedGuard)
    assert not core.forms.guard._requests
    assert not core.forms.guard._open
