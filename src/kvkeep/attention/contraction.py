"""Which shared nodes are worth reading apart; the others' pages go to their children.

The published rules are kept for comparison: they weigh padding and merges of a GPU kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvkeep.attention.cost import CostModel
from kvkeep.attention.tree import Forest, Node
from kvkeep.types import PAGE_TOKENS

GAIN = 0.95
"""A node is kept where reading it once is predicted to take less than this share of the time."""

MIN_NODE_TOKENS = 256
"""Below this many tokens of its own, a node costs more than it saves."""

Keep = Callable[[Node, Sequence[Node], Sequence[int]], bool]
"""Tells whether to keep an inner node, given its children and [places + 1] rows before a place."""


def contract(forest: Forest, row_bounds: Sequence[int], keep: Keep) -> Forest:
    """Return the forest without the inner nodes that `keep` refuses, deepest decided first."""
    nodes = list(forest.nodes)
    children: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes):
        if node.parent >= 0:
            children[node.parent].append(index)
    dropped = [False] * len(nodes)
    for index in reversed(range(len(nodes))):
        below = children[index]
        if not below or keep(nodes[index], [nodes[i] for i in below], row_bounds):
            continue
        dropped[index] = True
        parent = nodes[index].parent
        for child in below:
            nodes[child] = nodes[child]._replace(begin=nodes[index].begin, parent=parent)
        if parent >= 0:
            at = children[parent].index(index)
            children[parent][at : at + 1] = below
    return Forest(forest.order, _renumbered(nodes, dropped))


def ours(model: CostModel, group: int, cached_tokens: int = 0) -> Keep:
    """Keep a node where the profiled cost falls; `group` is G.

    Requests whose chains are no longer than `cached_tokens` find a prefix that the one before has
    read in the last-level cache: reading it apart costs memory once. What lies between two readings
    of a token is a whole chain, not the prefix.
    """

    def keep(node: Node, children: Sequence[Node], row_bounds: Sequence[int]) -> bool:
        tokens = (node.end - node.begin) * PAGE_TOKENS
        if tokens < MIN_NODE_TOKENS:
            return False
        rows = _rows(node, row_bounds)
        apart = model.ns(rows * group, tokens, merges=True)
        together = sum(
            model.ns(_rows(child, row_bounds) * group, tokens) - model.c0 for child in children
        )
        if max(child.end for child in children) * PAGE_TOKENS <= cached_tokens:
            together -= (len(children) - 1) * tokens * model.a_mem
        return apart < GAIN * together

    return keep


def fasttree(group: int, *, alpha: float = 0.66, beta: float = 0.33, gamma: float = 0.1) -> Keep:
    """Return FastTree's rule (MLSys 2025): padding of query tiles and of key tiles, and merges."""
    query_tile, key_tile = max(1, 64 // group), 32

    def product(queries: int, keys: int) -> float:
        pad_q = query_tile - ((queries - 1) % query_tile + 1) if queries else 0
        pad_k = max(0, key_tile - keys)
        return alpha * pad_q * group * keys + beta * pad_k * queries * group

    def keep(node: Node, children: Sequence[Node], row_bounds: Sequence[int]) -> bool:
        length = (node.end - node.begin) * PAGE_TOKENS
        queries = _rows(node, row_bounds)
        for child in children:
            own, below = _rows(child, row_bounds), (child.end - child.begin) * PAGE_TOKENS
            split_k = product(queries, length) + product(own, below) + gamma * own
            split_q = product(queries - own, length) + product(own, below + length)
            if split_k > split_q:
                return False
        return True

    return keep


def pat(group: int, *, most_rows: int = 64) -> Keep:
    """Return PAT's rule (ASPLOS 2026): tiles saved against four words of merging per query."""
    tile = max(1, most_rows // group)

    def tiles(queries: int) -> int:
        return -(-queries // tile)

    def keep(node: Node, children: Sequence[Node], row_bounds: Sequence[int]) -> bool:
        length = (node.end - node.begin) * PAGE_TOKENS
        queries = _rows(node, row_bounds)
        for child in children:
            own = _rows(child, row_bounds)
            saved = (tiles(queries) - tiles(queries - own) - tiles(own)) * length + 4 * own
            if own == queries or saved >= 0:
                return False
        return True

    return keep


def predicted_ns(forest: Forest, row_bounds: Sequence[int], model: CostModel, group: int) -> float:
    """Return what the forest's groups take for one KV head."""
    return sum(
        model.ns(
            _rows(node, row_bounds) * group,
            (node.end - node.begin) * PAGE_TOKENS,
            merges=node.parent >= 0,
        )
        for node in forest.nodes
    )


def _rows(node: Node, row_bounds: Sequence[int]) -> int:
    return row_bounds[node.last] - row_bounds[node.first]


def _renumbered(nodes: Sequence[Node], dropped: Sequence[bool]) -> tuple[Node, ...]:
    index: dict[int, int] = {-1: -1}
    kept: list[Node] = []
    for i, node in enumerate(nodes):
        if not dropped[i]:
            index[i] = len(kept)
            kept.append(node._replace(parent=index[node.parent]))
    return tuple(kept)
