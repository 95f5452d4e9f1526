"""A prefix attended in two places has the bits of one: states left by a part and gone on from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkeep.attention.apart import part_plan
from kvkeep.errors import KernelInputError
from kvkeep.ops.cpu import CpuKernel, available
from kvkeep.ops.layout import CARRIED, Attended, AttentionPlan, PartOps, Run
from kvkeep.ops.reference import ReferenceAttention
from kvkeep.types import PAGE_TOKENS, Layout
from tests.coded import CodedWorld, Context, coded_plan, make_coded_world
from tests.ops.paths import cpu_attention
from tests.oracles import Heads

HEADS = Heads(14, 2, 64)
Asked = list[tuple[Context, list[int]]]


@pytest.fixture(params=available())
def path(request: pytest.FixtureRequest) -> CpuKernel:
    name: CpuKernel = request.param
    return name


def rest_plan(world: CodedWorld, asked: Asked, apart: list[int]) -> AttentionPlan:
    """Return the flat plan without the first `apart` pages of each context."""
    whole = coded_plan(world, asked)
    runs = [Run(*run) for run in whole.runs.tolist()]
    kept: list[Run] = []
    groups = []
    for (begin, end, first, last), pages in zip(whole.groups.tolist(), apart, strict=True):
        at = len(kept)
        for run in runs[first:last]:
            gone = min(max(pages - run.first_position // PAGE_TOKENS, 0), run.page_count)
            position = run.first_position + gone * PAGE_TOKENS
            if run.page_count > gone:
                left = run.page_count - gone
                kept.append(Run(run.page_begin + gone, left, position, run.layout))
        groups.append([begin, end, at, len(kept)])
    parents = np.array([CARRIED if pages else -1 for pages in apart], np.int32)
    return replace(
        whole,
        groups=np.array(groups, np.int32),
        runs=np.array(kept, np.int32),
        parents=parents,
    )


def same(got: Attended, want: Attended) -> bool:
    return torch.equal(got.lse2, want.lse2) and torch.equal(
        got.out.view(torch.uint8), want.out.view(torch.uint8)
    )


def states_of(
    world: CodedWorld, asked: Asked, apart: list[int], q: torch.Tensor, holders: list[PartOps]
) -> torch.Tensor:
    """Return the states that the parts' holders leave, each by itself; NaN where none does."""
    rows, heads, dim = q.shape
    states = torch.full((2, rows, heads, dim + 2), torch.nan)
    row = 0
    for (context, positions), pages in zip(asked, apart, strict=True):
        end = row + len(positions)
        if pages:
            layout = context.layout if context.coded else world.model
            plan = part_plan(context.slots[:pages], layout, len(positions))
            holder = holders[row % len(holders)]
            states[:, row:end] = holder.attend_part(q[row:end], world.kv, plan)
        row = end
    return states


@pytest.mark.parametrize("model", [Layout.F32, Layout.BF16], ids=lambda layout: layout.name)
@pytest.mark.parametrize("layout", [Layout.K2V2, Layout.K8V8], ids=lambda layout: layout.name)
def test_two_places_have_the_bits_of_one(path: CpuKernel, layout: Layout, model: Layout) -> None:
    world = make_coded_world(HEADS, model, pages=240, mebibytes=16)
    coded = [world.add(layout, *shape) for shape in ((2, 70), (16, 5), (18, 1), (36, 130))]
    plain = [world.add(layout, 0, length) for length in (129, 1025, 1300, 2200)]
    asked: Asked = [(c, [c.length - 1]) for c in coded + plain]
    asked += [(coded[3], list(range(36 * 64, 36 * 64 + 130))), (coded[1], [500])]
    apart = [2, 16, 18, 36, 2, 16, 18, 34, 36, 0]
    whole = coded_plan(world, asked)
    q = world.tensor(len(whole.row_positions), HEADS.q, HEADS.dim)
    want = cpu_attention(path, 1).attend(q, world.kv, whole)
    holders: list[PartOps] = [cpu_attention(path, threads) for threads in (1, 2)]
    states = states_of(world, asked, apart, q, holders)
    rest = rest_plan(world, asked, apart)
    for threads in (1, 3):
        got = cpu_attention(path, threads).attend_after(q, world.kv, rest, states)
        assert same(got, want)
    without = replace(rest, parents=None)
    left_out = cpu_attention(path, 1).attend(q, world.kv, without)
    assert not torch.equal(left_out.lse2, want.lse2), "a part that is left out is seen"


def test_the_reference_goes_on_where_a_part_ended() -> None:
    world = make_coded_world(HEADS, Layout.F32, pages=80)
    asked: Asked = [(world.add(Layout.K2V2, 18, 70), [18 * 64 + 5, 18 * 64 + 69])]
    asked += [(world.add(Layout.K2V2, 0, 1300), [1299]), (world.add(Layout.K2V2, 2, 9), [130])]
    ops, apart = ReferenceAttention(), [18, 16, 0]
    whole = coded_plan(world, asked)
    q = world.tensor(len(whole.row_positions), HEADS.q, HEADS.dim)
    states = states_of(world, asked, apart, q, [ops])
    got = ops.attend_after(q, world.kv, rest_plan(world, asked, apart), states)
    want = ops.attend(q, world.kv, whole)
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse2, want.lse2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pages", [2, 16, 20])
def test_a_part_leaves_what_the_reference_does(path: CpuKernel, pages: int) -> None:
    world = make_coded_world(HEADS, Layout.F32, pages=24)
    context = world.add(Layout.K2V2, 20, 0)
    q = world.tensor(3, HEADS.q, HEADS.dim)
    plan = part_plan(context.slots[:pages], Layout.K2V2, 3)
    got, want = (
        ops.attend_part(q, world.kv, plan) for ops in (cpu_attention(path), ReferenceAttention())
    )
    for i, empty in enumerate((pages < 16, pages == 16)):
        for states in (got[i], want[i]):
            assert bool(states[..., 0].isinf().all()) is empty
        if not empty:
            lse2s = [s[i][..., 0] + torch.log2(s[i][..., 1]) for s in (got, want)]
            outs = [s[i][..., 2:] / s[i][..., 1:2] for s in (got, want)]
            torch.testing.assert_close(*lse2s, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-3)


def test_what_does_not_fit_is_refused(path: CpuKernel) -> None:
    world = make_coded_world(HEADS, Layout.F32, pages=24)
    context = world.add(Layout.K2V2, 4, 70)
    asked: Asked = [(context, [context.length - 1])]
    rest, whole = rest_plan(world, asked, [4]), coded_plan(world, asked)
    ops, q = cpu_attention(path), world.tensor(1, HEADS.q, HEADS.dim)
    states = torch.zeros(2, 1, HEADS.q, HEADS.dim + 2)
    for attention in (ops, ReferenceAttention()):
        with pytest.raises(KernelInputError, match="do not fit"):
            attention.attend_after(q, world.kv, rest, states[..., 1:])
        with pytest.raises(KernelInputError, match="no group"):
            attention.attend_after(q, world.kv, whole, states)
    with pytest.raises(KernelInputError, match="what is passed differ"):
        ops.attend(q, world.kv, rest)
    with pytest.raises(KernelInputError, match="whole steps"):
        ops.attend_part(q, world.kv, part_plan(context.slots[:3], Layout.K2V2, 1))
