"""Two worlds on whole engines: what a tenant is told does not depend on fewer than k others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvkeep.engine.api import Chunk, GenerateRequest, SamplingParams, TenantTerms
from kvkeep.engine.build import Parts, build_core, default_parts
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions, KvName, PolicyName, SharingOptions
from kvkeep.models.text import TextModel
from kvkeep.sharing.promotion import Promotion
from tests.calibrated import calibrated
from tests.engine.test_sharing import ClearsAll, wait_for_scans

K = 4
BYSTANDERS = tuple(f"b{i}" for i in range(K + 1))
TENANTS = ("x0", "v0", "v1", *BYSTANDERS)
PARAMS = SamplingParams(max_tokens=6, temperature=0.9, seed=7, logprobs=2, ignore_eos=True)
WORDS = "The parcel of {} is at the third door of the north gate and waits for its owner. "
Turn = tuple[str, int, int]
"""Tenant or 'epoch', which text, how many tokens of it."""


class World:
    """One engine and what the attacker is told."""

    def __init__(
        self, model: Path, policy: PolicyName, kv: KvName = "bf16", guard_share: float = 0.0
    ) -> None:
        share = SharingOptions(policy=policy, k=K)
        options = EngineOptions(
            model=str(model),
            threads=2,
            kv_cache_bytes=32 << 20,
            max_num_seqs=16,
            share=share,
            kv=kv,
            kv_auto_tokens=400,
            guard_share=guard_share,
            guard_samples=1,
            guard_kl=1e-9,
        )
        parts = Parts(techniques=default_parts(options).techniques, inspector=ClearsAll())
        self.core: EngineCore = build_core(options, parts=parts)
        text = TextModel.load(model)
        self.texts = [text.encode(WORDS.format(name) * 40)[:600] for name in ("Ada", "Bo", "Cy")]
        terms = {name: TenantTerms(voter=name, group="all") for name in TENANTS}
        self.core.set_tenants(dict.fromkeys(TENANTS, 0.09), terms)
        self.told: list[tuple[object, ...]] = []
        self._sent = 0
        self._now = 0.0
        for name in BYSTANDERS:
            self.send(name, self.texts[2])
        self.end_epoch()
        self.end_epoch()

    def send(self, tenant: str, prompt: Sequence[int]) -> None:
        """Send a prompt; the attacker's are read to their end, others' run beside them."""
        self._sent += 1
        request_id = f"{tenant}-{self._sent}"
        self.core.submit(
            GenerateRequest(
                id=request_id, tenant=tenant, scope=tenant, prompt_ids=tuple(prompt), params=PARAMS
            )
        )
        if tenant != "x0":
            self.core.step()
            return
        asked = self.core._requests[request_id]
        chunks: list[Chunk] = []
        while not chunks or chunks[-1].finish is None:
            outputs = self.core.step()
            chunks += [o.chunk for o in outputs if o.request_id == request_id]
        self.told.append((asked.saved_tokens, *chunks))

    def end_epoch(self) -> None:
        while not self.core.idle():
            self.core.step()
        if isinstance(self.core.sharing.policy, Promotion):
            wait_for_scans(self.core.sharing.policy)
        self._now += 60.0
        self.core.end_epoch(self._now)

    def play(self, turns: Sequence[Turn]) -> bytes:
        for tenant, which, count in turns:
            if tenant == "epoch":
                self.end_epoch()
            else:
                self.send(tenant, self.texts[which][:count])
        self.end_epoch()
        self.core.close()
        return repr(self.told).encode()


def script(seed: int) -> list[Turn]:
    """Return turns in which victims and attacker send two texts, bystanders and all the third."""
    draw = random.Random(seed)
    turns: list[Turn] = []
    for _ in range(14):
        who = draw.choice(["x0", "x0", "v0", "v1", "epoch", draw.choice(BYSTANDERS)])
        which = 2 if who in BYSTANDERS else draw.choice([0, 0, 1, 2])
        turns.append((who, which, draw.choice([520, 530, 600, 300])))
    return [*turns, ("v0", 0, 600), ("epoch", 0, 0), ("epoch", 0, 0), ("x0", 0, 600)]


def same(
    model: Path, policy: PolicyName, seed: int, kv: KvName = "bf16", guard_share: float = 0.0
) -> bool:
    turns = script(seed)
    without = [turn for turn in turns if not turn[0].startswith("v")]
    worlds = [World(model, policy, kv, guard_share) for _ in range(2)]
    return worlds[0].play(turns) == worlds[1].play(without)


@pytest.mark.parametrize("policy", ["selective", "isolate", "dp"])
def test_an_attacker_is_told_the_same_with_and_without_victims(
    tiny: dict[str, Path], policy: PolicyName
) -> None:
    assert all(same(tiny["llama"], policy, seed) for seed in range(2))


@pytest.mark.parametrize("kv", ["k2v2", "auto", "calibrated"])
def test_an_attacker_is_told_the_same_of_coded_pages(
    tiny: dict[str, Path], tmp_path: Path, kv: KvName
) -> None:
    model = tiny["llama"]
    if kv == "calibrated":
        model = calibrated(model, tmp_path / "model")
    assert same(model, "selective", 0, kv)


def test_an_attacker_is_told_the_same_beside_shadows(tiny: dict[str, Path]) -> None:
    """It steps back on the way, after what its own requests' shadows say."""
    assert same(tiny["llama"], "selective", 0, "k2v2", guard_share=0.5)


def test_tenants_step_back_in_that_test(tiny: dict[str, Path]) -> None:
    world = World(tiny["llama"], "selective", "k2v2", guard_share=0.5)
    world.play(script(0))
    back = {use.tenant: use.steps_back for use in world.core.stats().guard}
    assert back["x0"] == 1
    assert set(back.values()) == {0, 1}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kv", "guard_share"), [("bf16", 0.0), ("k2v2", 0.0), ("auto", 0.0), ("k2v2", 0.5)]
)
def test_an_attacker_is_told_the_same_at_length(
    tiny: dict[str, Path], kv: KvName, guard_share: float
) -> None:
    assert all(same(tiny["llama"], "selective", seed, kv, guard_share) for seed in range(50))


def test_an_attacker_is_told_more_where_everything_is_shared(tiny: dict[str, Path]) -> None:
    assert not same(tiny["llama"], "share_all", 0)


@pytest.mark.parametrize("kv", ["bf16", "k2v2"])
def test_the_snapshot_is_used_in_these_tests(tiny: dict[str, Path], kv: KvName) -> None:
    world = World(tiny["llama"], "selective", kv)
    world.send("x0", world.texts[2])
    assert world.told[0][0] == 512
    world.core.close()
