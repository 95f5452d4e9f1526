"""A row's bits on codes: alone, in a batch, on any threads, in a tree and by the flat plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkeep.ops.cpu import CpuKernel, available
from kvkeep.ops.layout import Attended, AttentionPlan, Run
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout
from tests.coded import CodedWorld, Context, coded_plan, make_coded_world
from tests.ops.paths import cpu_attention
from tests.oracles import Heads

HEADS = Heads(14, 2, 64)


@pytest.fixture(params=available())
def path(request: pytest.FixtureRequest) -> CpuKernel:
    name: CpuKernel = request.param
    return name


def same(got: Attended, want: Attended) -> bool:
    return torch.equal(got.lse2, want.lse2) and torch.equal(
        got.out.view(torch.uint8), want.out.view(torch.uint8)
    )


def pick(whole: Attended, rows: list[int]) -> Attended:
    return Attended(whole.out[rows].contiguous(), whole.lse2[rows], None)


@pytest.mark.parametrize("model", [Layout.F32, Layout.BF16], ids=lambda layout: layout.name)
@pytest.mark.parametrize("layout", [Layout.K2V2, Layout.K8V8], ids=lambda layout: layout.name)
def test_alone_in_a_batch_and_on_any_threads(
    path: CpuKernel, layout: Layout, model: Layout
) -> None:
    world = make_coded_world(HEADS, model, pages=120)
    shapes = [(2, 0), (2, 1), (16, 64), (18, 100), (34, 0), (6, 130)]
    contexts = [world.add(layout, *shape) for shape in shapes]
    parts = [(context, [context.length - 1]) for context in contexts]
    parts[3][1].append(700)  # sees but a part of the codes
    parts[4][1].extend([2000, 63, 64, 127])
    plan = coded_plan(world, parts)
    q = world.tensor(len(plan.row_positions), HEADS.q, HEADS.dim)
    batch = cpu_attention(path, 1).attend(q, world.kv, plan)
    for threads in (2, 3):
        assert same(cpu_attention(path, threads).attend(q, world.kv, plan), batch)
    row = 0
    for context, positions in parts:
        for position in positions:
            alone = coded_plan(world, [(context, [position])])
            got = cpu_attention(path, 2).attend(q[row : row + 1], world.kv, alone)
            assert same(got, pick(batch, [row]))
            row += 1


def tree_plan(
    world: CodedWorld, context: Context, shared: int, owners: list[list[int]], tail: list[int]
) -> tuple[AttentionPlan, AttentionPlan]:
    """Return the tree's plan and the flat one.

    Every row sees `shared` pages of the context, then its owner's pages, whose last `tail[i]` are
    in the model's dtype.
    """
    slots = context.slots
    pages: list[Int32Array] = [slots[:shared]]
    runs = [Run(0, shared, 0, int(context.layout))]
    groups = [[0, len(owners), 0, 1]]
    positions = []
    entries = shared
    flat_parts: list[tuple[list[Run], Int32Array]] = []
    for row, (own, floats) in enumerate(zip(owners, tail, strict=True)):
        begin = len(runs)
        coded = len(own) - floats
        first = shared * PAGE_TOKENS
        found = [
            Run(entries, coded, first, int(context.layout)),
            Run(entries + coded, floats, first + coded * PAGE_TOKENS, int(world.model)),
        ]
        runs += [run for run in found if run.page_count]
        groups.append([row, row + 1, begin, len(runs)])
        pages.append(np.array(own, np.int32))
        flat_parts.append((runs[begin:], pages[-1]))
        positions.append((shared + len(own)) * PAGE_TOKENS - 1 - row % 7)
        entries += len(own)
    tree = AttentionPlan(
        np.array(positions, np.int32),
        np.array(groups, np.int32),
        np.array(runs, np.int32),
        np.concatenate(pages).astype(np.int32),
        parents=np.array([-1] + [0] * len(owners), np.int32),
    )
    flat_runs: list[Run] = []
    flat_groups: list[list[int]] = []
    flat_pages: list[Int32Array] = []
    entries = 0
    for row, (own_runs, own_pages) in enumerate(flat_parts):
        begin, moved = len(flat_runs), entries + shared - own_runs[0].page_begin
        flat_runs.append(runs[0]._replace(page_begin=entries))
        flat_runs += [run._replace(page_begin=run.page_begin + moved) for run in own_runs]
        flat_groups.append([row, row + 1, begin, len(flat_runs)])
        flat_pages += [slots[:shared], own_pages]
        entries += shared + len(own_pages)
    flat = replace(
        tree,
        groups=np.array(flat_groups, np.int32),
        runs=np.array(flat_runs, np.int32),
        pages=np.concatenate(flat_pages).astype(np.int32),
        parents=None,
    )
    return tree, flat


@pytest.mark.parametrize("shared", [2, 16, 22])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("requests", [2, 5, 20])
def test_tree_and_flat(path: CpuKernel, shared: int, threads: int, requests: int) -> None:
    heads = Heads(6, 2, 64)
    world = make_coded_world(heads, Layout.BF16, pages=60)
    context = world.add(Layout.K2V2, 40, 6 * PAGE_TOKENS)
    coded, floats = context.slots[22:40].tolist(), context.slots[40:].tolist()
    owners = []
    tails = []
    for i in range(requests):
        tails.append(1 + i % 5)
        count = 2 * (i % 9)
        owners.append([coded[(i + j) % 18] for j in range(count)] + floats[: tails[-1]])
    tree, flat = tree_plan(world, context, shared, owners, tails)
    q = world.tensor(requests, heads.q, heads.dim)
    ops = cpu_attention(path, threads)
    want = ops.attend(q, world.kv, flat)
    got = ops.attend(q, world.kv, tree)
    assert same(got, want)


def test_many_rows_of_one_prompt_over_codes(path: CpuKernel) -> None:
    """A chunk whose rows see codes and then floats equals its rows taken one by one."""
    heads = Heads(7, 1, 128)
    world = make_coded_world(heads, Layout.BF16, pages=40)
    context = world.add(Layout.K4V2, 18, 150)
    rows = list(range(context.coded_tokens, context.length))
    q = world.tensor(len(rows), heads.q, heads.dim)
    ops = cpu_attention(path, 2)
    whole = ops.attend(q, world.kv, coded_plan(world, [(context, rows)]))
    for i in range(0, len(rows), 13):
        alone = coded_plan(world, [(context, [rows[i]])])
        assert same(ops.attend(q[i : i + 1], world.kv, alone), pick(whole, [i]))
