"""Leaves that moved: the patched forest covers what a fresh one does, and gives the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkeep.attention.chains import chains_of
from kvkeep.attention.patch import with_moved
from kvkeep.attention.planner import FlatPlanner
from kvkeep.attention.tree import Forest, build_forest
from kvkeep.ops.cpu import CpuKernel, available
from kvkeep.types import BatchGeometry, Layout
from tests.attention.test_planner import same, shared_pages
from tests.forests import Asked, covers, eager, filled, geometry
from tests.ops.paths import ops_for
from tests.oracles import Heads

PREFIX = 12


def beam_step(tails: Sequence[Sequence[int]], views: Sequence[int], length: int) -> BatchGeometry:
    """Return beams on one prefix of `PREFIX` pages, each with pages of its own and a view's id."""
    asked = [Asked([*range(PREFIX), *tail], length) for tail in tails]
    step = geometry(asked, Layout.F32)
    for segment, view in zip(step.segments, views, strict=True):
        segment.view.id = view
    return step


def forked(step: BatchGeometry, moves: dict[int, int]) -> tuple[BatchGeometry, Forest, Forest]:
    """Return the step after moves {place: source}, its forest patched, and a fresh one."""
    old = chains_of(step)
    tails = [c.pages[PREFIX:].tolist() for c in old]
    for place, source in moves.items():
        tails[place] = [*tails[source][:-1], 200 + place]
    views = [100 + i if i in moves else i for i in range(len(old))]
    after = beam_step(tails, views, step.segments[0].first_position + 1)
    patched = with_moved(build_forest(old), chains_of(after), set(moves), across_scopes=True)
    assert patched is not None
    return after, patched, build_forest(chains_of(after))


def test_a_fork_hangs_where_its_source_does() -> None:
    step = beam_step([[20 + i, 60 + i] for i in range(6)], range(6), PREFIX * 64 + 70)
    _, patched, fresh = forked(step, {4: 1, 2: 5})
    assert set(patched.order) == set(range(6))
    assert [n[:3] for n in patched.nodes] == [n[:3] for n in fresh.nodes]


def test_a_fork_moves_between_inner_nodes() -> None:
    """Two groups of three beams with four pages in common each; one beam changes sides."""
    tails = [[*(30, 31, 32, 33), 50 + i] for i in range(3)]
    tails += [[*(40, 41, 42, 43), 60 + i] for i in range(3)]
    step = beam_step(tails, range(6), (PREFIX + 4) * 64 + 9)
    after, patched, fresh = forked(step, {1: 4})
    assert [n[:3] for n in patched.nodes].count((PREFIX, PREFIX + 4, 0)) == 2
    assert sorted(n[3:] for n in patched.nodes if n.last - n.first > 1) == sorted(
        n[3:] for n in fresh.nodes if n.last - n.first > 1
    )
    assert covers(eager(2).plan(after), after)


def refused(tails: Sequence[Sequence[int]], moved: set[int], length: int, *, across: bool) -> bool:
    before = beam_step([[20 + i] * 9 for i in range(len(tails))], range(len(tails)), length)
    after = beam_step(tails, [100 + i for i in range(len(tails))], length)
    found = with_moved(
        build_forest(chains_of(before)), chains_of(after), moved, across_scopes=across
    )
    return found is None


def test_a_fresh_forest_is_made_where_it_may_share_more() -> None:
    length = (PREFIX + 8) * 64 + 3
    own = [[20 + i] * 9 for i in range(4)]
    assert not refused([own[0], own[1], own[2], [90] * 9], {3}, length, across=True)
    assert refused([own[0], own[1], own[2], own[1]], {3}, length, across=True), "a node in common"
    assert refused(own, {0, 1, 2, 3}, length, across=True), "nobody is left to compare with"


def test_a_chain_of_another_prefix_or_scope_is_not_placed() -> None:
    step = beam_step([[20 + i, 60 + i] for i in range(4)], range(4), PREFIX * 64 + 70)
    forest, chains = build_forest(chains_of(step)), chains_of(step)
    stranger = replace(chains[2], view=99, pages=chains[2].pages + 300)
    assert with_moved(forest, [*chains[:2], stranger, chains[3]], {2}, across_scopes=True) is None
    guest = replace(chains[2], view=99, scope="other")
    moved = [*chains[:2], guest, chains[3]]
    assert with_moved(forest, moved, {2}, across_scopes=False) is None
    assert with_moved(forest, moved, {2}, across_scopes=True) is not None
    short = replace(chains[2], view=99, shareable=PREFIX - 2)
    assert with_moved(forest, [*chains[:2], short, chains[3]], {2}, across_scopes=True) is None


def test_a_node_left_with_one_child_is_planned_afresh() -> None:
    tails = [[*(30, 31, 32, 33), 50 + i] for i in range(2)]
    tails += [[40 + i] * 5 for i in range(3)]
    length = (PREFIX + 4) * 64 + 9
    forest = build_forest(chains_of(beam_step(tails, range(5), length)))
    after = beam_step([tails[0], [44] * 5, *tails[2:]], [0, 101, 2, 3, 4], length)
    assert with_moved(forest, chains_of(after), {1}, across_scopes=True) is None


@pytest.mark.parametrize("kernel", available())
@pytest.mark.parametrize("seed", range(3))
def test_a_long_search_is_planned_and_computed_as_if_afresh(kernel: CpuKernel, seed: int) -> None:
    """Beams grow, end and fork for 300 steps: patched plans cover, and attend with equal bits."""
    chance, heads = np.random.default_rng(seed), Heads(4, 2, 64)
    pool, planner = filled(ops_for(kernel), heads, Layout.F32, 120, seed), eager(2)
    width, free = 6, list(range(PREFIX, 120))
    tails = [[free.pop()] for _ in range(width)]
    views, next_view, patched = list(range(width)), width, 0
    for number in range(300):
        length = PREFIX * 64 + 1 + number
        if number and number % 64 == 0:
            for tail in tails:
                tail.append(free.pop())
        for place in chance.permutation(width)[: chance.integers(0, 3)]:
            source = int(chance.integers(width))
            if source != place:
                free.append(tails[place][-1])
                tails[place] = [*tails[source][:-1], free.pop(0)]
                views[place], next_view = next_view, next_view + 1
        step = beam_step(tails, views, length)
        plan, fresh = planner.plan(step), eager(2).plan(step)
        assert covers(plan, step)
        assert shared_pages(plan) >= PREFIX
        patched += not same(plan, fresh)
        if number % 60 == 7:
            q = pool.queries(width)
            results = [
                ops_for(kernel).attend(q, pool.world.kv, p)
                for p in (plan, fresh, FlatPlanner().plan(step))
            ]
            for other in results[1:]:
                assert torch.equal(results[0].out, other.out)
                assert torch.equal(results[0].lse2, other.lse2)
    assert patched > 50, "in their order at least, patched leaves are told from fresh ones"
