"""Adversarial forests: the float64 oracle, one bit pattern for all ways of planning, provenance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Final, Literal, NamedTuple

import numpy as np
import pytest
import torch

from kvkeep.attention.chains import STEP_PAGES, Chain, chains_of
from kvkeep.attention.contraction import contract
from kvkeep.attention.planner import FlatPlanner, plan_of, row_bounds
from kvkeep.attention.tree import Forest, Node, build_forest
from kvkeep.ops.cpu import CpuKernel, available
from kvkeep.ops.layout import Attended, AttentionPlan
from kvkeep.types import PAGE_TOKENS, BatchGeometry, Layout
from tests.counts import examples
from tests.forests import Asked, Filled, covers, eager, filled, geometry
from tests.ops.paths import PATHS, Path, ops_for
from tests.oracles import Float64, Heads, attention_oracle, causal, tolerance

HEADS: Final = Heads(4, 2, 64)
PAGES: Final = 190
LEAVES: Final = range(150, PAGES)
"""Pages that no two requests begin with."""

Scores = Literal["drawn", "root", "leaf", "equal"]
"""Where the one huge score is, if there is one."""

SCORES: Final[tuple[Scores, ...]] = ("drawn", "root", "leaf", "equal")
COUNTS: Final = (1, 15, 16, 17, 63, 64, 65, 129)


@cache
def pool_of(layout: Layout, scores: Scores) -> Filled:
    """Return a pool whose keys make such scores."""
    ops = ops_for(PATHS[-1])
    pool = filled(ops, HEADS, layout, PAGES)
    if scores == "equal":
        pool.k[:] = 0
    elif scores == "root":
        pool.k[1, 7] *= 60.0
    elif scores == "leaf":
        pool.k[LEAVES.start :: 3, 0] *= 60.0
    slots = np.arange(PAGES * PAGE_TOKENS, dtype=np.int32)
    shape = (-1, HEADS.kv, HEADS.dim)
    ops.append(pool.world.kv, pool.k.view(shape), pool.v.view(shape), slots)
    return pool


def forest_of_requests(rng: np.random.Generator) -> list[Asked]:
    """Return chains, duplicates, several roots, one-token leaves and whole last pages."""
    long = bool(rng.random() < 0.25)
    spine = list(range(148 if long else int(rng.integers(4, 40))))
    other = list(range(60, 60 + int(rng.integers(4, 20))))
    free = iter(rng.permutation(LEAVES).tolist())
    asked: list[Asked] = []
    for _ in range(int(rng.integers(3, 12))):
        trunk = other if rng.random() < 0.2 and not long else spine
        most = 12 if long else len(trunk)
        cut = len(trunk) if rng.random() < 0.4 else int(rng.integers(1, most + 1))
        slots = [*trunk[:cut], *(next(free) for _ in range(int(rng.integers(0, 4))))]
        if rng.random() < 0.3:
            slots = slots[: len(slots) // 2 * 2] or slots
        begin = (len(slots) - 1) * PAGE_TOKENS
        length = begin + int(rng.choice([1, 5, 33, 63, 64, 64]))
        asked.append(Asked(slots, length, int(rng.choice([1, 1, 1, min(length, 9)]))))
        if rng.random() < 0.3:
            asked.append(asked[-1])
    return asked


def whole(chain: Chain) -> Chain:
    """Return a chain whose only row sees all its pages to their end as one that shares them all."""
    end = len(chain.pages) * PAGE_TOKENS
    wholly = chain.num_rows == 1 and chain.first_position == end - 1
    return replace(chain, shareable=len(chain.pages)) if wholly and _even(chain) else chain


def _even(chain: Chain) -> bool:
    return len(chain.pages) % STEP_PAGES == 0


def below_nothing(forest: Forest) -> Forest:
    """Return the forest below one root that has no tokens."""
    root = Node(0, 0, -1, 0, len(forest.order))
    return Forest(forest.order, (root, *(n._replace(parent=n.parent + 1) for n in forest.nodes)))


def any_plan(step: BatchGeometry, rng: np.random.Generator) -> AttentionPlan:
    """Return a plan of some of the step's shared nodes, perhaps with empty nodes in it."""
    chains = [whole(one) for one in chains_of(step)]
    forest = build_forest(chains)
    kept = contract(forest, row_bounds(chains, forest.order), lambda *_: bool(rng.random() < 0.7))
    return plan_of(step, chains, below_nothing(kept) if rng.random() < 0.3 else kept)


class Step(NamedTuple):
    """Requests, their queries, and what float64 makes of each request's gathered tiles."""

    asked: list[Asked]
    q: torch.Tensor
    out: Float64
    lse2: Float64
    allowed: Float64

    def check(self, got: Attended) -> None:
        """Hold every row to the oracle."""
        error = np.abs(got.out.double().numpy() - self.out)
        worst = (error / self.allowed).max()
        assert worst <= 1, f"{worst:.2f} times what is allowed"
        assert np.abs(got.lse2.numpy() - self.lse2).max() <= 1e-3


def exact(pool: Filled, asked: list[Asked]) -> Step:
    """Return a step of these requests; float32 rounds scores by as much as their terms are large.

    Where terms of a huge score cancel, that moves a weight by more than the usual tolerance.
    """
    q = pool.queries(sum(one.rows for one in asked))
    outs, lse2s, row, terms = [], [], 0, 0.0
    for one in asked:
        rows = slice(row, row + one.rows)
        k, v = pool.tokens(np.array(one.slots, np.int32), one.length)
        visible = causal(HEADS, range(one.length - one.rows, one.length), one.length)
        found = attention_oracle(q[rows], k, v, visible)
        outs.append(found.out)
        lse2s.append(found.lse2)
        for head in range(HEADS.q):
            heard = k[:, head * HEADS.kv // HEADS.q].abs().float()
            terms = max(terms, float((heard @ q[rows, head].abs().float().T).max()))
        row += one.rows
    out = np.concatenate(outs)
    usual = tolerance(pool.world.layout, out)
    moved = 2.0**-24 * terms / math.sqrt(HEADS.dim) * math.log2(math.e) * np.abs(out).max()
    return Step(asked, q, out, np.concatenate(lse2s), usual + moved)


@cache
def random_step(layout: Layout, scores: Scores, seed: int) -> Step:
    """Return the step of a random forest of such scores: one for all paths."""
    rng = np.random.default_rng([seed, SCORES.index(scores)])
    return exact(pool_of(layout, scores), forest_of_requests(rng))


def assert_same_bits(one: Attended, other: Attended, rows: list[int] | None = None) -> None:
    """Compare one with `rows` of the other, in that order."""
    chosen = torch.arange(len(other.out)) if rows is None else torch.tensor(rows)
    assert torch.equal(one.out.view(torch.uint8), other.out[chosen].view(torch.uint8))
    assert torch.equal(one.lse2, other.lse2[chosen])


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("seed", range(examples(2, 25)))
def test_any_forest_meets_the_oracle_with_one_pattern_of_bits(
    path: Path, layout: Layout, scores: Scores, seed: int
) -> None:
    """Whatever nodes are kept, in whatever order requests stand, on any number of threads."""
    pool, made = pool_of(layout, scores), random_step(layout, scores, seed)
    rng, asked, q = np.random.default_rng(seed), made.asked, made.q
    step = geometry(asked, layout)
    flat = ops_for(path).attend(q, pool.world.kv, FlatPlanner().plan(step))
    made.check(flat)
    if path == "reference":
        return
    for threads in (1, 2, 3):
        plan = any_plan(step, rng)
        assert covers(plan, step)
        assert_same_bits(ops_for(path, threads).attend(q, pool.world.kv, plan), flat)
    order = rng.permutation(len(asked)).tolist()
    places = [step.segments[i] for i in order]
    rows = [one.first_row + i for one in places for i in range(one.num_rows)]
    shuffled = geometry([asked[i] for i in order], layout)
    plan = any_plan(shuffled, rng)
    assert_same_bits(ops_for(path, 2).attend(q[rows], pool.world.kv, plan), flat, rows)


def test_those_forests_hold_what_they_should() -> None:
    """Empty nodes, duplicates, chains, several roots, one-token leaves, more than 128 pages."""
    found = set[str]()
    for seed in range(60):
        rng = np.random.default_rng([seed, 0])
        asked = forest_of_requests(rng)
        plan = any_plan(geometry(asked, Layout.F32), rng)
        sizes = [int(plan.runs[b:e, 1].sum()) for _, _, b, e in plan.groups.tolist()]
        parents = [] if plan.parents is None else plan.parents.tolist()
        inner = set(parents) - {-1}
        roots = [g for g in inner if parents[g] < 0]
        found |= {"empty leaf" for g in set(range(len(sizes))) - inner if not sizes[g]}
        found |= {"empty root" for g in roots if not sizes[g]}
        found |= {"two roots" for _ in roots[1:]}
        found |= {"chain" for g in inner if parents[g] in inner - set(roots)}
        found |= {"long node" for g in inner if sizes[g] > 128}
        found |= {"duplicate" for i, one in enumerate(asked) if one in asked[:i]}
        found |= {"one token" for one in asked if one.length % PAGE_TOKENS == 1}
    assert found == {
        "empty leaf", "empty root", "two roots", "chain", "long node", "duplicate", "one token",
    }  # fmt: skip


@cache
def many(layout: Layout, scores: Scores, count: int) -> Step:
    """Return the step of `count` requests on one prefix: one for all paths."""
    leaves = [LEAVES[i % len(LEAVES)] for i in range(count)]
    asked = [
        Asked([*range(4), leaf], 4 * PAGE_TOKENS + 1 + i % 64) for i, leaf in enumerate(leaves)
    ]
    return exact(pool_of(layout, scores), asked)


@pytest.mark.parametrize("scores", ["root", pytest.param("leaf", marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kernel", available())
def test_a_node_of_many_requests_meets_the_oracle(
    kernel: CpuKernel, layout: Layout, scores: Scores, count: int
) -> None:
    made = many(layout, scores, count)
    step = geometry(made.asked, layout)
    plan = eager(2).plan(step) if count > 1 else below_nothing_plan(step)
    assert plan.parents is not None
    made.check(ops_for(kernel, 2).attend(made.q, pool_of(layout, scores).world.kv, plan))


def below_nothing_plan(step: BatchGeometry) -> AttentionPlan:
    """Return the plan of a single request whose leaf goes on from an empty root."""
    chains = chains_of(step)
    return plan_of(step, chains, below_nothing(build_forest(chains)))


# Provenance, by the kernels' own results: equal scores and values that name their page


WIDE: Final = Heads(2, 1, 128)
"""As many dims as there are pages to name."""


@pytest.fixture(scope="module")
def named() -> Filled:
    pool = filled(ops_for(PATHS[-1]), WIDE, Layout.F32, WIDE.dim)
    pool.k[:] = 0
    pool.v[:] = torch.eye(WIDE.dim)[:, None, None, :]
    slots = np.arange(WIDE.dim * PAGE_TOKENS, dtype=np.int32)
    shape = (-1, WIDE.kv, WIDE.dim)
    ops_for(PATHS[-1]).append(pool.world.kv, pool.k.view(shape), pool.v.view(shape), slots)
    return pool


def branches() -> list[Asked]:
    """Return a forest over the named pages: a spine, forks of forks, a duplicate, a root alone."""
    spine, fork = list(range(20)), [*range(10), *range(30, 42)]
    return [
        Asked([*spine, 50, 51], 21 * PAGE_TOKENS + 9),
        Asked([*spine, 52], 20 * PAGE_TOKENS + 1),
        Asked([*fork, 53], 22 * PAGE_TOKENS + 64, rows=3),
        Asked([*fork, 54], 22 * PAGE_TOKENS + 30),
        Asked([*fork, 54], 22 * PAGE_TOKENS + 30),
        Asked(range(60, 67), 7 * PAGE_TOKENS - 1),
    ]


def times_read(pool: Filled, path: Path, plan: AttentionPlan) -> np.ndarray:
    """Return [T, P] how many tokens of each page each row has in its sum."""
    rows = len(plan.row_positions)
    got = ops_for(path, 2).attend(torch.zeros(rows, WIDE.q, WIDE.dim), pool.world.kv, plan)
    counts = got.out.double() * torch.exp2(got.lse2.double())[..., None]
    assert (counts - counts.round()).abs().max() < 0.05
    assert torch.equal(counts.round()[:, 0], counts.round()[:, 1])
    return counts.round()[:, 0].numpy()


def times_wanted(step: BatchGeometry) -> np.ndarray:
    wanted = np.zeros((step.num_rows, WIDE.dim))
    for one in step.segments:
        for i in range(one.num_rows):
            last = one.first_position + i
            full, part = divmod(last + 1, PAGE_TOKENS)
            wanted[one.first_row + i, one.view.slots[:full]] = PAGE_TOKENS
            if part:
                wanted[one.first_row + i, one.view.slots[full]] = part
    return wanted


def test_kernels_read_each_of_a_rows_tiles_exactly_once(path: Path, named: Filled) -> None:
    step = geometry(branches(), Layout.F32)
    tree, flat = eager(2).plan(step), FlatPlanner().plan(step)
    assert tree.parents is not None
    assert len(set(tree.parents.tolist())) > 3
    for plan in (tree, flat):
        assert np.array_equal(times_read(named, path, plan), times_wanted(step))


def a_siblings_pages(plan: AttentionPlan) -> AttentionPlan:
    """Return the plan with the first page of the last two leaves' runs exchanged."""
    pages, (one, other) = plan.pages.copy(), plan.runs[-2:, 0]
    pages[[one, other]] = pages[[other, one]]
    return replace(plan, pages=pages)


def a_page_twice(plan: AttentionPlan) -> AttentionPlan:
    pages = plan.pages.copy()
    pages[1] = pages[0]
    return replace(plan, pages=pages)


def a_node_lost(plan: AttentionPlan) -> AttentionPlan:
    groups = plan.groups.copy()
    groups[0, 3] = groups[0, 2]
    return replace(plan, groups=groups)


@pytest.mark.parametrize("fault", [a_siblings_pages, a_page_twice, a_node_lost])
def test_planted_faults_are_seen(
    path: Path, named: Filled, fault: Callable[[AttentionPlan], AttentionPlan]
) -> None:
    step = geometry(branches(), Layout.F32)
    faulty = fault(eager(2).plan(step))
    assert not covers(faulty, step)
    assert not np.array_equal(times_read(named, path, faulty), times_wanted(step))
