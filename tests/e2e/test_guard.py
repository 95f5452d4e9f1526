"""Shadows beside coded requests: what they say, what they cost, and that nobody else notices."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from kvkeep.attention.planner import FlatPlanner
from kvkeep.engine.api import Chunk, FinishReason, SamplingParams
from kvkeep.engine.backend import Backend, choose
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.choosing import KEPT
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.guard import LAG, Guard
from kvkeep.engine.guarded import GuardUse
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from kvkeep.eviction.policy import KeepAll
from kvkeep.ops.layout import Attended, AttentionOps, AttentionPlan, LayerKV, Observe, chains
from kvkeep.quant.codec import Codec, Float, Place, Tiles
from kvkeep.quant.hack import Hack
from kvkeep.shield.policy import NoShield
from kvkeep.types import Layout
from tests.e2e.test_coded import bits, everything_is_given_back, prompt_of
from tests.engines import core_for, drive, request
from tests.toys import EightBit

PARAMS = SamplingParams(max_tokens=8, temperature=0.8, seed=7, logprobs=2, ignore_eos=True)


class Exact(EightBit):
    """Stores pages as they were computed, in blocks: coded and shadow have the same bits."""

    name = "exact"

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        return Float().encode(k, v, place)


class Drifting:
    """A backend's attention with a fault: rows that read codes come out too large."""

    def __init__(self, inner: AttentionOps) -> None:
        self._inner = inner
        self.append, self.merge = inner.append, inner.merge

    @property
    def bytes_read(self) -> int:
        return self._inner.bytes_read

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        found = self._inner.attend(q, kv, plan, observe)
        for rows, runs in chains(plan):
            if any(run.layout == Layout.K8V8 for run in runs):
                found.out[list(rows)] *= 4
        return found


def drifting_backend(model: Path) -> Backend:
    chosen = choose(EngineOptions(model=str(model)), threads=2)
    return replace(chosen, ops=replace(chosen.ops, attention=Drifting(chosen.ops.attention)))


def guarded(
    model: Path,
    codec: Codec,
    *,
    share: float = 1.0,
    backend: Backend | None = None,
    **options: object,
) -> EngineCore:
    parts = Parts(
        techniques=Techniques(codec, NoShield(), KeepAll()), planner=FlatPlanner(), backend=backend
    )
    settings = {"max_num_seqs": 8, "guard_samples": 2, "guard_share": share, **options}
    return core_for(model, parts=parts, **settings)  # type: ignore[arg-type]


def use_of(core: EngineCore, tenant: str = "a") -> GuardUse:
    return next(use for use in core.stats().guard if use.tenant == tenant)


def conversation(core: EngineCore, count: int) -> list[list[Chunk]]:
    """Return what each of some requests was told, one after the other."""
    return [drive(core, [request(prompt_of(200, i), PARAMS)])["r"] for i in range(count)]


def test_a_codec_that_loses_nothing_is_no_different_from_its_shadow(tiny: dict[str, Path]) -> None:
    """Cold, warm, with several sequences, chunks and preemptions: every row has its equal."""
    core = guarded(tiny["qwen2"], Exact(), chunk_tokens=48, tenants={"a": 1.0})
    several = replace_params(n=3, max_tokens=40)
    drive(core, [request(prompt_of(200), PARAMS, id=str(i)) for i in range(3)])
    drive(core, [request(prompt_of(150 + 40 * i, i), several, id=str(i)) for i in range(3)])
    core.caches.of("exact").set_quotas({"a": 9}, 0)
    drive(
        core,
        [request(prompt_of(150, i), replace_params(max_tokens=90), id=str(i)) for i in range(4)],
    )
    assert core.stats().preemptions_total > 0
    use = use_of(core)
    assert use.shadowed == 10
    assert use.compared_tokens == use.agreed_tokens == 3 * 8 + 3 * 40 + 4 * 90
    assert use.kl_nats == 0.0
    assert use.steps_back == 0
    everything_is_given_back(core)


def replace_params(**changes: int) -> SamplingParams:
    return msgspec.structs.replace(PARAMS, **changes)


@pytest.mark.parametrize("kv", ["k2v2", "auto"])
def test_answers_have_the_same_bits_with_and_without_shadows(
    tiny: dict[str, Path], kv: str
) -> None:
    asked = [
        request(
            prompt_of(90 + 70 * i, i), replace_params(n=1 + i % 2), id=str(i), tenant="ab"[i % 2]
        )
        for i in range(6)
    ]
    told = []
    for share in (0.0, 0.5, 1.0):
        core = build_core(
            EngineOptions(
                model=str(tiny["qwen2"]), threads=2, kv=kv, kv_auto_tokens=200, chunk_tokens=48,  # type: ignore[arg-type]
                max_num_seqs=8, kv_cache_bytes=64 << 20, guard_share=share, guard_kl=1e3,
            )
        )  # fmt: skip
        core.set_tenants({"a": 0.5, "b": 0.5})
        got = [drive(core, asked) for _ in ("cold", "warm")]
        told.append([[bits(run[r.id], i) for i in range(r.params.n)] for run in got for r in asked])
        if share == 1.0:
            assert use_of(core).compared_tokens > 0
    assert told[0] == told[1] == told[2]


def forms_of(core: EngineCore) -> dict[str, int]:
    return dict(core.stats().kv_chosen)


def test_a_drift_planted_in_a_kernel_takes_its_tenant_back_to_more_bits(
    tiny: dict[str, Path],
) -> None:
    model = tiny["qwen2"]
    core = guarded(model, Hack(Layout.K8V8), backend=drifting_backend(model))
    told = conversation(core, 6)
    assert use_of(core).steps_back == 1
    assert forms_of(core) == {"k8v8": 4, KEPT: 2}, "an epoch has two samples, the next one waits"
    sound = guarded(model, Hack(Layout.K8V8), share=0.0, kv="auto", kv_auto_tokens=10**6)
    kept = conversation(sound, 6)
    assert forms_of(sound) == {KEPT: 6}
    assert [bits(chunks) for chunks in told[4:]] == [bits(chunks) for chunks in kept[4:]]
    drive(core, [request(prompt_of(200), PARAMS, tenant="b")])
    assert use_of(core, "b").steps_back == 0
    assert forms_of(core)["k8v8"] == 5, "another tenant has to find out for itself"


def test_without_a_drift_nobody_steps_back(tiny: dict[str, Path]) -> None:
    core = guarded(tiny["qwen2"], Hack(Layout.K8V8))
    conversation(core, 6)
    use = use_of(core)
    assert (use.shadowed, use.compared_tokens, use.steps_back) == (6, 48, 0)
    assert 0 < use.kl_nats / use.compared_tokens < 0.01
    assert forms_of(core) == {"k8v8": 6}


def test_a_request_too_large_for_the_kept_form_stays_coded(tiny: dict[str, Path]) -> None:
    model = tiny["qwen2"]
    core = guarded(model, Hack(Layout.K8V8), backend=drifting_backend(model))
    conversation(core, 4)
    core.caches.of(KEPT).set_quotas({"a": 4, "b": 4}, 0)
    long, short = prompt_of(260), prompt_of(200)
    got = drive(core, [request(long, PARAMS, id="long"), request(short, PARAMS, id="short")])
    assert [got[name][-1].finish for name in ("long", "short")] == [FinishReason.LENGTH] * 2
    assert forms_of(core) == {"k8v8": 5, KEPT: 1}


def test_shadows_are_paid_from_their_tenants_share(tiny: dict[str, Path]) -> None:
    core = guarded(tiny["qwen2"], Exact(), guard_kl=1e3)
    kept = core.caches.of(KEPT)
    kept.set_quotas({"a": 7, "b": 7}, 0)
    params = replace_params(max_tokens=50)
    for i in range(3):
        core.submit(request(prompt_of(180, i), params, id=str(i)))
    core.submit(request(prompt_of(450), params, id="large"))
    most = 0
    while not core.idle():
        core.step()
        most = max(most, kept.used("a"))
        assert kept.used("a") in (0, 4), "three pages are left, and the next shadow waits for four"
        assert kept.used("b") == 0
    use = use_of(core)
    assert (most, use.shadowed, use.unshadowed) == (4, 3, 1)
    assert use.compared_tokens == 3 * 50
    everything_is_given_back(core)


def test_a_shadow_says_no_more_than_its_limit(tiny: dict[str, Path]) -> None:
    core = guarded(tiny["qwen2"], Exact())
    core.submit(request(prompt_of(30), replace_params(max_tokens=20)))
    sample = core._requests["r"].sample
    assert sample is not None
    assert (sample.limit, sample.reserved_tokens) == (20, 50)
    sample.limit = 5
    for _ in range(8):
        core.step()
    assert core.caches.of(KEPT).used("a") == 0
    drive(core)
    assert use_of(core).compared_tokens == 5
    drive(core, [request(prompt_of(30), replace_params(max_tokens=0))])
    assert use_of(core).compared_tokens == 6


def test_beam_searches_and_cancelled_requests_say_nothing(tiny: dict[str, Path]) -> None:
    core = guarded(tiny["qwen2"], Exact())
    beams = SamplingParams(max_tokens=6, n=2, use_beam_search=True, ignore_eos=True)
    drive(core, [request(prompt_of(100), beams)])
    assert core.caches.of(KEPT).stats().pages_used == 0
    core.submit(request(prompt_of(100), replace_params(max_tokens=100)))
    for _ in range(9):
        core.step()
    assert core.caches.of(KEPT).used("a") == 4
    core.cancel("r")
    assert core.caches.of(KEPT).used("a") == 0
    use = use_of(core)
    assert (use.shadowed, use.unshadowed, use.compared_tokens) == (0, 2, 0)
    everything_is_given_back(core)


def test_random_runs_give_everything_back(tiny: dict[str, Path]) -> None:
    core = guarded(tiny["qwen2"], Exact(), share=0.6, tenants={"a": 0.6, "b": 0.3}, chunk_tokens=48)
    for form, pages in (("exact", 7), (KEPT, 8)):
        core.caches.of(form).set_quotas({"a": pages, "b": pages}, 0)
    draw, alive = random.Random(5), []
    for i in range(24):
        params = replace_params(n=draw.choice([1, 1, 3]), max_tokens=draw.choice([1, 20, 70]))
        prompt = prompt_of(draw.choice([20, 100, 300]), draw.randrange(4))
        late = draw.choice([None, None, None, 0.02])
        core.submit(request(prompt, params, id=str(i), tenant="ab"[i % 2], deadline_s=late))
        alive.append(str(i))
        for _ in range(draw.randrange(4)):
            core.step()
        if draw.random() < 0.2:
            core.cancel(alive.pop(draw.randrange(len(alive))))
    drive(core)
    assert core.stats().preemptions_total > 0
    assert all(use.shadowed and use.kl_nats == 0.0 for use in core.stats().guard)
    assert all(use.compared_tokens == use.agreed_tokens for use in core.stats().guard)
    assert core.caches.of(KEPT).stats().pages_used == 0, "no page of a shadow is indexed"
    everything_is_given_back(core)


class Hasty(Guard):
    """Judges by what has ended so far."""

    def floor(self, tenant: str, epoch: int) -> int | None:
        own = self._history(tenant)
        for judged in range(own.known + 1 - LAG, epoch + 1 - LAG):
            ended = [sample for sample in own.samples.get(judged, []) if sample.settled]
            own.samples[judged] = ended
        return super().floor(tenant, epoch)


def under_load(model: Path, *, load: int, hasty: bool = False) -> tuple[list[object], int]:
    """Return what one tenant is told while another sends so many requests, and its steps back."""
    core = guarded(
        model, Hack(Layout.K2V2), guard_kl=1e-9, guard_samples=1, max_num_batched_tokens=64
    )
    if hasty:
        core.forms.guard.__class__ = Hasty
    asked = [request(prompt_of(140 + 9 * i, i), PARAMS, id=f"a{i}") for i in range(8)]
    others = [request(prompt_of(400, i), PARAMS, id=f"b{i}", tenant="b") for i in range(load)]
    told: dict[str, list[Chunk]] = {}
    for one in others:
        core.submit(one)
    for one in asked:
        core.submit(one)
        for name, chunks in step(core).items():
            told.setdefault(name, []).extend(chunks)
    for name, chunks in drive(core).items():
        told.setdefault(name, []).extend(chunks)
    return [bits(told[one.id]) for one in asked], use_of(core).steps_back


def step(core: EngineCore) -> dict[str, list[Chunk]]:
    found: dict[str, list[Chunk]] = {}
    for _ in range(8):
        for output in core.step():
            found.setdefault(output.request_id, []).append(output.chunk)
    return found


def test_another_tenants_load_does_not_decide_when_one_steps_back(tiny: dict[str, Path]) -> None:
    alone, back = under_load(tiny["qwen2"], load=0)
    assert back == 1
    assert under_load(tiny["qwen2"], load=4) == (alone, back)


def test_a_guard_that_does_not_wait_would_let_it(tiny: dict[str, Path]) -> None:
    """The test above can fail."""
    alone, _ = under_load(tiny["qwen2"], load=0, hasty=True)
    assert under_load(tiny["qwen2"], load=4, hasty=True)[0] != alone


def test_where_nothing_can_drift_there_is_nothing_to_guard(tiny: dict[str, Path]) -> None:
    options = EngineOptions(model=str(tiny["qwen2"]), kv_cache_bytes=1 << 26, guard_share=0.5)
    with pytest.raises(ConfigError, match=r"guard_share: pages of kv = bf16 .* choose another kv"):
        build_core(options)
