"""A long random run says the same, bit for bit, whether prefixes are read together or apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from kvkeep.attention.cost import SEED, save
from kvkeep.attention.planner import AttentionPlanner, FlatPlanner, TreePlanner
from kvkeep.engine.api import Chunk, FinishReason, GenerateRequest, SamplingParams
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.engine.engine import EngineCore
from kvkeep.eviction.policy import KeepAll
from kvkeep.ops.cpu import CpuKernel, available
from kvkeep.ops.layout import AttentionPlan
from kvkeep.quant.codec import Float
from kvkeep.sharing.policy import ShareAll
from kvkeep.shield.policy import NoShield
from kvkeep.types import BatchGeometry, Layout, View
from tests.e2e.test_coded import poison
from tests.engines import core_for, drive, request
from tests.forests import ALWAYS, Asked, covers, eager, geometry

TENANTS = {"a": 0.3, "b": 0.3, "c": 0.3}
GROUP = 2
"""G of the tiny qwen3."""

PAGES = 60
Bits = dict[tuple[str, int], list[object]]


@dataclass
class Checked:
    """Another planner's plans, each of them checked, and what they shared."""

    inner: AttentionPlanner
    trees: int = 0
    mixed: int = 0
    """Groups whose rows belong to several scopes."""
    largest: int = 0
    """Rows of the largest group that others go on from."""
    forgotten: set[int] = field(default_factory=set)

    def plan(self, geometry: BatchGeometry) -> AttentionPlan:
        plan = self.inner.plan(geometry)
        assert covers(plan, geometry)
        scope = {
            segment.first_row + i: segment.view.tag.scope
            for segment in geometry.segments
            for i in range(segment.num_rows)
        }
        rows = range(geometry.num_rows) if plan.row_order is None else plan.row_order.tolist()
        for begin, end, *_ in plan.groups.tolist():
            self.mixed += len({scope[row] for row in rows[begin:end]}) > 1
        if plan.parents is not None:
            self.trees += 1
            parents = sorted(set(plan.parents.tolist()) - {-1})
            sizes = plan.groups[parents, 1] - plan.groups[parents, 0]
            self.largest = max(self.largest, int(sizes.max()))
        return plan

    def forget(self, view: View) -> None:
        self.forgotten.add(view.id)
        self.inner.forget(view)


def parts(planner: AttentionPlanner | None) -> Parts:
    return Parts(
        techniques=Techniques(Float(), NoShield(), KeepAll()), policy=ShareAll(), planner=planner
    )


def prompt(rng: np.random.Generator, prefixes: list[list[int]]) -> list[int]:
    """Return a prefix, in part or whole, and a few tokens of its own."""
    prefix = prefixes[rng.integers(len(prefixes))]
    cut = len(prefix) if rng.random() < 0.7 else int(rng.integers(1, len(prefix)))
    return [*prefix[:cut], *rng.integers(1, 200, rng.integers(1, 90)).tolist()]


def arrivals(seed: int, count: int) -> dict[int, list[GenerateRequest]]:
    """Return requests by the step in which they come."""
    rng = np.random.default_rng(seed)
    trunk = rng.integers(1, 200, 384).tolist()
    prefixes = [
        trunk,
        [*trunk, *rng.integers(1, 200, 300).tolist()],
        [*trunk[:256], *rng.integers(1, 200, 290).tolist()],
        rng.integers(1, 200, 330).tolist(),
    ]
    found: dict[int, list[GenerateRequest]] = {}
    for number in range(count):
        tenant = "abc"[rng.integers(3)]
        beams = bool(rng.random() < 0.2)
        params = SamplingParams(
            max_tokens=int(rng.integers(4, 60)),
            temperature=0.0 if beams else float(rng.choice([0.0, 0.9])),
            seed=number,
            n=int(rng.choice([1, 1, 1, 3])),
            best_of=4 if beams or rng.random() < 0.1 else None,
            use_beam_search=beams,
            logprobs=2,
            ignore_eos=True,
        )
        item = request(
            prompt(rng, prefixes),
            params,
            id=f"r{number}",
            tenant=tenant,
            scope=f"{tenant}-{rng.integers(2)}",
        )
        found.setdefault(int(rng.integers(0, 3 * count)), []).append(item)
    return found


def bits(chunks: dict[str, list[Chunk]]) -> Bits:
    """Return what each sequence says: tokens, log-probabilities to the last bit, how it ends."""
    said: Bits = {}
    for name, parts_of in chunks.items():
        for chunk in parts_of:
            assert chunk.error is None
            said.setdefault((name, chunk.index), []).extend(
                [chunk.token_ids, chunk.logprobs, chunk.text, chunk.finish, chunk.score]
            )
    assert all(FinishReason.LENGTH in found for found in said.values())
    return said


def live(core: EngineCore, seed: int, count: int) -> Bits:
    """Run the arrivals to their end."""
    coming = arrivals(seed, count)

    def each_step(step: int) -> None:
        for item in coming.pop(step, []):
            core.submit(item)

    first = min(coming)
    got = drive(core, coming.pop(first), each_step)
    while coming:  # the engine was idle before the last came
        for name, chunks in drive(core, coming.pop(min(coming))).items():
            got.setdefault(name, []).extend(chunks)
    return bits(got)


Start = Callable[..., EngineCore]


@pytest.fixture(scope="module")
def start(tiny: dict[str, Path]) -> Start:
    """Return what starts an engine of a small pool."""

    def start(planner: AttentionPlanner | None, dtype: str, **options: object) -> EngineCore:
        return core_for(
            tiny["qwen3"],
            tenants=TENANTS,
            parts=parts(planner),
            pages=PAGES,
            page_bytes=64 * 3 * 2 * 32 * 2 * (4 if dtype == "float32" else 2),
            dtype=dtype,
            **{"chunk_tokens": 80, "max_num_batched_tokens": 256, **options},
        )

    return start


COUNT = 40
LONG_COUNT = 300


@pytest.fixture(scope="module")
def flat(start: Start) -> Callable[[str], Bits]:
    """Return what a dtype's run says where every request reads its own pages."""

    @functools.cache
    def said(dtype: str) -> Bits:
        core = start(FlatPlanner(), dtype)
        found = live(core, 1, COUNT)
        assert core.stats().attention_tree_steps_total == 0
        assert core.stats().preemptions_total > 0
        return found

    return said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_run_gives_the_same_bits_with_trees(
    start: Start, flat: Callable[[str], Bits], dtype: str
) -> None:
    planner = Checked(eager(GROUP))
    core = start(planner, dtype)
    assert live(core, 1, COUNT) == flat(dtype)
    stats = core.stats()
    assert stats.preemptions_total > 0
    assert stats.attention_tree_steps_total == planner.trees > stats.steps_total / 4
    assert stats.attention_planned_bytes_total < 0.9 * stats.attention_flat_bytes_total
    assert planner.mixed > 0, "no prefix was shared between scopes"
    assert planner.largest >= 3
    assert planner.forgotten


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engines_own_planner_gives_the_same_bits(
    start: Start, flat: Callable[[str], Bits], dtype: str
) -> None:
    """It decides by costs measured at start; so small a prefix may well stay in the cache."""
    core = start(None, dtype)
    assert isinstance(core._runner._parts.planner, TreePlanner)
    assert live(core, 1, COUNT) == flat(dtype)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_hundreds_of_requests_give_the_same_bits_with_trees(
    start: Start, dtype: str, seed: int
) -> None:
    """Thousands of steps, hundreds of preemptions; an eager planner and one that weighs."""
    flat = start(FlatPlanner(), dtype)
    want = live(flat, seed, LONG_COUNT)
    assert flat.stats().steps_total > 1000
    assert flat.stats().preemptions_total > 100
    for inner in (eager(GROUP), TreePlanner(SEED, GROUP)):
        planner = Checked(inner)
        core = start(planner, dtype)
        assert live(core, seed, LONG_COUNT) == want
        assert planner.trees > 100
        assert core.stats().preemptions_total > 100


def test_a_planner_that_weighs_costs_gives_the_same_bits(
    start: Start, flat: Callable[[str], Bits]
) -> None:
    """Some steps read together and some do not, as the seed's costs have it."""
    planner = Checked(TreePlanner(SEED, GROUP))
    core = start(planner, "bfloat16")
    assert live(core, 1, COUNT) == flat("bfloat16")
    assert 0 < planner.trees < core.stats().steps_total
    assert core.stats().preemptions_total > 0


def test_no_group_holds_rows_of_two_scopes_where_never_asked(
    start: Start, flat: Callable[[str], Bits]
) -> None:
    planner = Checked(eager(GROUP, across_scopes=False))
    assert live(start(planner, "bfloat16"), 1, COUNT) == flat("bfloat16")
    assert planner.trees > 0
    assert planner.mixed == 0


@pytest.mark.parametrize(("across", "shares"), [("public", True), ("never", False)])
def test_the_setting_decides_whether_tenants_read_together(
    start: Start, tmp_path: Path, across: str, shares: bool
) -> None:
    """Two scopes hold a prefix that no cache keeps: too long for the tiny model, not to plan."""
    save(tmp_path / "costs.json", {Layout.BF16: ALWAYS})
    core = start(
        None,
        "bfloat16",
        attention_share_across_tenants=across,
        attention_cost_model=str(tmp_path / "costs.json"),
    )
    asked = [Asked([*range(2000), 2001 + i], 2000 * 64 + 9, scope="ab"[i]) for i in range(2)]
    step = geometry(asked, Layout.BF16)
    plan = core._runner._parts.planner.plan(step)
    assert covers(plan, step)
    assert (plan.parents is not None) is shares


@pytest.mark.parametrize("beams", [False, True])
def test_sequences_of_one_request_read_its_prompt_together(start: Start, beams: bool) -> None:
    params = SamplingParams(
        max_tokens=40, seed=5, n=4, ignore_eos=True, use_beam_search=beams, logprobs=0
    )
    ids = np.random.default_rng(4).integers(1, 200, 500).tolist()
    planner = Checked(eager(GROUP, across_scopes=False))
    core = start(planner, "bfloat16")
    got = bits(drive(core, [request(ids, params)]))
    assert planner.largest == 4
    assert got == bits(drive(start(FlatPlanner(), "bfloat16"), [request(ids, params)]))


@pytest.mark.parametrize("kernel", available())
def test_scores_that_are_not_finite_fail_their_request_alone(
    start: Start, kernel: CpuKernel
) -> None:
    """It reads a prefix together with others, whose bits stay; its error says what to look at."""
    prefix = np.random.default_rng(6).integers(1, 200, 300).tolist()
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=2)
    tails = {"good": [3, 4], "bad": [5, 250, 6, 7], "other": [8]}

    def asked(*names: str) -> list[GenerateRequest]:
        return [request([*prefix, *tails[name]], params, id=name) for name in names]

    want = bits(drive(start(FlatPlanner(), "float32", kernel=kernel), asked("good", "other")))
    planner = Checked(eager(GROUP))
    core = start(planner, "float32", kernel=kernel)
    poison(core, 250)
    drive(core, [request(prefix, SamplingParams(max_tokens=1), id="first")])
    got = drive(core, asked(*tails))
    (failed,) = got.pop("bad")
    assert failed.finish is FinishReason.ERROR
    assert "infinite or not a number" in (failed.error or "")
    assert bits(got) == want
    assert planner.largest >= 3, "they were not read together"
