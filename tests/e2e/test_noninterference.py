"""Two worlds on whole engines: what a tenant is told does not depend on fewer than k others."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.engine.options import EvictName, KvName, PolicyName, ShieldName
from tests.calibrated import calibrated
from tests.e2e.engine_worlds import CASTS, Setup, Turn, World, script

TIGHT = 11 << 20
"""Memory for pages in which an attacker's requests evict and preempt each other."""
MEMORY_BYTES = 20 << 20
"""Of sealed pages: an attacker's part holds twice what its part of the pool does."""

MEMORY = TierSizes(memory_bytes=MEMORY_BYTES)
BOTH = TierSizes(MEMORY_BYTES, 3 * MEMORY_BYTES)


def same(setup: Setup, folder: Path, seed: int, *, at_length: bool = False) -> bool:
    """Tell whether the attackers are told the same in both worlds."""
    attackers, victims = CASTS[seed % 2]
    turns = script(seed, seed % 2, at_length=at_length)
    without = [turn for turn in turns if turn.who not in victims]
    told = []
    for i, played in enumerate((turns, without)):
        place = folder / f"{seed}-{i}"
        place.mkdir()
        told.append(World(setup, place, attackers).play(played))
    return told[0] == told[1]


@pytest.mark.parametrize(
    ("policy", "seed"), [("selective", 0), ("selective", 1), ("isolate", 0), ("dp", 1)]
)
def test_an_attacker_is_told_the_same_with_and_without_victims(
    tiny: dict[str, Path], tmp_path: Path, policy: PolicyName, seed: int
) -> None:
    assert same(Setup(tiny["llama"], policy), tmp_path, seed)


def test_an_attacker_is_told_the_same_where_its_pages_are_evicted(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    setup = Setup(tiny["llama"], kv_cache_bytes=TIGHT)
    assert same(setup, tmp_path, 1)


@pytest.mark.parametrize("kv", ["k2v2", "auto", "calibrated"])
def test_an_attacker_is_told_the_same_of_coded_pages(
    tiny: dict[str, Path], tmp_path: Path, kv: KvName
) -> None:
    model = tiny["llama"]
    if kv == "calibrated":
        model = calibrated(model, tmp_path / "model")
    assert same(Setup(model, kv=kv), tmp_path, 0)


def test_an_attacker_is_told_the_same_of_pages_that_are_sealed_in_memory(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    assert same(Setup(tiny["llama"], shield="tile"), tmp_path, 1)


@pytest.mark.parametrize(("kv", "evict"), [("bf16", "corm"), ("k2v2", "corm")])
def test_an_attacker_is_told_the_same_where_tokens_are_evicted(
    tiny: dict[str, Path], tmp_path: Path, kv: KvName, evict: EvictName
) -> None:
    assert same(Setup(tiny["llama"], kv=kv, evict=evict), tmp_path, 0)


def test_an_attacker_is_told_the_same_beside_shadows(tiny: dict[str, Path], tmp_path: Path) -> None:
    """It steps back on the way, after what its own requests' shadows say."""
    assert same(Setup(tiny["llama"], kv="k2v2", guard_share=0.5), tmp_path, 0)


def test_tenants_step_back_in_that_test(tiny: dict[str, Path], tmp_path: Path) -> None:
    world = World(Setup(tiny["llama"], kv="k2v2", guard_share=0.5), tmp_path, ("x0",))
    world.play(script(0))
    back = {use.tenant: use.steps_back for use in world.core.stats().guard}
    assert back["x0"] == 1
    assert set(back.values()) == {0, 1}


def test_an_attacker_is_told_the_same_of_pages_below_memory(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    assert same(Setup(tiny["llama"], kv_cache_bytes=TIGHT, below=MEMORY), tmp_path, 0)


def test_one_order_of_use_for_all_tenants_pages_below_memory_is_seen(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    setup = Setup(tiny["llama"], kv_cache_bytes=TIGHT, below=MEMORY, one_shelf=True)
    assert not same(setup, tmp_path, 0)


def test_pages_come_from_below_memory_in_these_tests(tiny: dict[str, Path], tmp_path: Path) -> None:
    world = World(Setup(tiny["llama"], kv_cache_bytes=TIGHT, below=BOTH), tmp_path, ("x0",))
    asked = [Turn("x0", which, 600) for which in (0, 1, 2)]
    world.play([*asked, *asked, Turn("restart"), *asked])
    assert world.tier_hits > 0


AT_LENGTH = [
    Setup(Path()),
    Setup(Path(), kv_cache_bytes=TIGHT),
    Setup(Path(), "dp"),
    Setup(Path(), kv="k2v2"),
    Setup(Path(), kv="auto"),
    Setup(Path(), evict="corm"),
    Setup(Path(), kv="k2v2", evict="corm"),
    Setup(Path(), kv="k2v2", guard_share=0.5),
    Setup(Path(), kv_cache_bytes=TIGHT, below=MEMORY),
    Setup(Path(), kv_cache_bytes=TIGHT, below=BOTH),
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setup", AT_LENGTH, ids=lambda s: "-".join(map(str, s[1:])))
def test_an_attacker_is_told_the_same_at_length(
    tiny: dict[str, Path], tmp_path: Path, setup: Setup
) -> None:
    chosen = setup._replace(model=tiny["llama"])
    assert all(same(chosen, tmp_path, seed, at_length=True) for seed in range(50))


@pytest.mark.parametrize(
    "policy", ["share_all", "safekv", pytest.param("salt", marks=pytest.mark.slow)]
)
def test_an_attacker_is_told_more_by_the_unsafe_policies(
    tiny: dict[str, Path], tmp_path: Path, policy: PolicyName
) -> None:
    assert not same(Setup(tiny["llama"], policy), tmp_path, 0)


@pytest.mark.parametrize(
    ("kv", "restarts", "shield"), [("bf16", 1, None), ("k2v2", 0, None), ("bf16", 0, "tile")]
)
def test_the_snapshot_is_used_in_these_tests(
    tiny: dict[str, Path], tmp_path: Path, kv: KvName, restarts: int, shield: ShieldName | None
) -> None:
    world = World(Setup(tiny["llama"], kv=kv, shield=shield), tmp_path, ("x0",))
    world.play([*[Turn("restart")] * restarts, Turn("x0", 2, 600)])
    assert world.told[0][0] == 512


def test_pages_are_evicted_and_requests_preempted_in_these_tests(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    world = World(Setup(tiny["llama"], kv_cache_bytes=TIGHT), tmp_path, ("x0",))
    world.play([Turn("x0", which, 600, how) for which in range(3) for how in ("ask", "crowd")])
    assert world.preemptions > 0
    assert world.evicted > 0
