"""Chains made by hand and at random, and what a forest of them must be, from its definition."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np

from kvkeep.attention.chains import STEP_PAGES, Chain
from kvkeep.attention.tree import Forest, Node

Nodes = set[tuple[frozenset[int], int, int]]
"""Chains of a node, by their place in the step, and its pages [begin, end)."""


def chain(
    pages: Sequence[int],
    *,
    shareable: int | None = None,
    view: int = 0,
    first_row: int = 0,
    rows: int = 1,
    scope: str = "s",
) -> Chain:
    """Return a chain; unless told, all but the step its last page lies in can be shared."""
    own = max(0, len(pages) - 1) // STEP_PAGES * STEP_PAGES
    return Chain(
        view=view,
        version=0,
        first_row=first_row,
        num_rows=rows,
        first_position=len(pages) * 64 - rows,
        pages=np.array(pages, np.int32),
        coded=0,
        shareable=own if shareable is None else shareable,
        scope=scope,
        masks=None,
    )


@st.composite
def branching(draw: st.DrawFn) -> list[Chain]:
    """Random chains: each branches off an earlier one at any page, or repeats it, or is its own."""
    chains: list[Chain] = []
    free = iter(range(10_000, 20_000))
    for number in range(draw(st.integers(1, 12))):
        pages: list[int] = []
        if chains and draw(st.integers(0, 4)) != 0:
            other = chains[draw(st.integers(0, len(chains) - 1))].pages.tolist()
            pages = other[: draw(st.integers(0, len(other)))]
        pages += [next(free) for _ in range(draw(st.integers(0, 7)))]
        pages = pages or [next(free)]
        most = len(pages) // STEP_PAGES
        usual = (len(pages) - 1) // STEP_PAGES
        shareable = draw(st.sampled_from([usual, most, max(0, usual - 1), 0]))
        chains.append(
            chain(
                pages,
                shareable=shareable * STEP_PAGES,
                view=number,
                first_row=number,
                scope=draw(st.sampled_from("ab")),
            )
        )
    return chains


def common_pages(one: Chain, other: Chain, *, across_scopes: bool) -> int:
    """Return the leading pages two chains may read together, page by page."""
    if one.scope != other.scope and not across_scopes:
        return 0
    count = 0
    while (
        count < min(one.shareable, other.shareable)
        and one.pages[count : count + STEP_PAGES].tolist()
        == other.pages[count : count + STEP_PAGES].tolist()
    ):
        count += STEP_PAGES
    return count


def expected_nodes(chains: Sequence[Chain], *, across_scopes: bool = True) -> Nodes:
    """Return a forest's nodes from their definition: who shares each step with whom."""
    steps: dict[frozenset[int], list[int]] = {}
    own = [0] * len(chains)
    for i, one in enumerate(chains):
        for step in range(one.shareable // STEP_PAGES):
            end = (step + 1) * STEP_PAGES
            members = frozenset(
                j
                for j, other in enumerate(chains)
                if j == i or common_pages(one, other, across_scopes=across_scopes) >= end
            )
            if len(members) > 1:
                steps.setdefault(members, []).append(step * STEP_PAGES)
                own[i] = end
    inner = {(who, min(at), max(at) + STEP_PAGES) for who, at in steps.items()}
    leaves = {(frozenset([i]), own[i], len(c.pages)) for i, c in enumerate(chains)}
    return inner | leaves


def nodes_of(forest: Forest) -> Nodes:
    """Return a forest's nodes by the chains they hold."""
    return {(frozenset(forest.order[n.first : n.last]), n.begin, n.end) for n in forest.nodes}


def path_to(forest: Forest, node: Node) -> list[Node]:
    """Return the nodes from a root to this one."""
    path = [node]
    while path[0].parent >= 0:
        path.insert(0, forest.nodes[path[0].parent])
    return path


def leaves(forest: Forest) -> list[Node]:
    """Return the nodes without children, in order."""
    parents = {node.parent for node in forest.nodes}
    return [node for i, node in enumerate(forest.nodes) if i not in parents]


def is_whole(forest: Forest, chains: Sequence[Chain]) -> bool:
    """Tell whether each chain's pages are those of its path, in order, each exactly once."""
    ends = leaves(forest)
    if [(n.first, n.last) for n in ends] != [(i, i + 1) for i in range(len(chains))]:
        return False
    for place, leaf in enumerate(ends):
        covered: list[int] = []
        for node in path_to(forest, leaf):
            held = chains[forest.order[node.first]]
            if not node.first <= place < node.last or node.begin != len(covered):
                return False
            covered += held.pages[node.begin : node.end].tolist()
        if covered != chains[forest.order[place]].pages.tolist():
            return False
    return sorted(forest.order) == list(range(len(chains)))
