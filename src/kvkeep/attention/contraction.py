"""Which shared nodes are worth reading apart; the others' pages go to their children."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvkeep.attention.chains import Chain
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


@dataclass(frozen=True, slots=True)
class Costs:
    """What nodes take: of their pages the leading ones may be coded, the others are not."""

    chains: Sequence[Chain]
    order: Sequence[int]
    """As a forest's."""
    plain: CostModel
    coded: CostModel

    def model_of(self, node: Node) -> CostModel:
        """Return the model of a shared node: all its pages are stored in one form."""
        return self.coded if self._coded_pages(node) else self.plain

    def ns(self, node: Node, rows: int) -> float:
        """Return what a node takes by `rows` rows of one KV head."""
        coded = self._coded_pages(node)
        plain = node.end - node.begin - coded
        took = self.model_of(node).ns(rows, coded * PAGE_TOKENS, merges=node.parent >= 0)
        return took + self.plain.ns(rows, plain * PAGE_TOKENS) - self.plain.c0

    def _coded_pages(self, node: Node) -> int:
        held = self.chains[self.order[node.first]]
        return min(max(held.coded - node.begin, 0), node.end - node.begin)


def ours(model_of: Callable[[Node], CostModel], group: int, cached_tokens: int = 0) -> Keep:
    """Keep a node where the profiled cost falls, by the model of its pages; `group` is G.

    Requests whose chains are no longer than `cached_tokens` find a prefix that the one before has
    read in the last-level cache: reading it apart costs memory once. What lies between two readings
    of a token is a whole chain, not the prefix.
    """

    def keep(node: Node, children: Sequence[Node], row_bounds: Sequence[int]) -> bool:
        tokens = (node.end - node.begin) * PAGE_TOKENS
        if tokens < MIN_NODE_TOKENS:
            return False
        model = model_of(node)
        apart = model.ns(_rows(node, row_bounds) * group, tokens, merges=True)
        together = sum(
            model.ns(_rows(child, row_bounds) * group, tokens) - model.c0 for child in children
        )
        if max(child.end for child in children) * PAGE_TOKENS <= cached_tokens:
            together -= (len(children) - 1) * tokens * model.a_mem
        return apart < GAIN * together

    return keep


def predicted_ns(forest: Forest, row_bounds: Sequence[int], costs: Costs, group: int) -> float:
    """Return what the forest's groups take for one KV head."""
    return sum(costs.ns(node, _rows(node, row_bounds) * group) for node in forest.nodes)


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
