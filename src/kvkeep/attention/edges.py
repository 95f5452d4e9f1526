r"""The published rules, edge by edge, for comparison with ours: they weigh a GPU kernel's tiles.

Top-down, each child of a node goes on from it, or is given a copy of its tokens and leaves:

        [0, 32)                [0, 32)    [0, 40)
       /   |   \       ->      /   |         c
      a    b    c            a    b
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvkeep.attention.chains import Chain
from kvkeep.attention.tree import Children, Forest, children_of, depth_first
from kvkeep.types import PAGE_TOKENS

Leaves = Callable[[int, int, int, int], bool]
"""Tells whether a child leaves, given its node's rows as yet and tokens, and its own of both."""


def without_edges(forest: Forest, chains: Sequence[Chain], leaves: Leaves) -> Forest:
    """Return the forest in which children for which `leaves` holds read their parents' tokens too.

    A request that ends with a node has no tokens to go on with and stays; a node that fewer than
    two go on from is read by whoever does.
    """
    return _Edges(forest, chains).decided(leaves)


class _Edges:
    """A forest whose children leave their parents one by one."""

    def __init__(self, forest: Forest, chains: Sequence[Chain]) -> None:
        self._forest = forest
        self._chains = chains
        self._children: Children = children_of(forest)
        self._parents = {c: node for node, below in self._children.items() for c in below}
        self._rows = {
            index: sum(chains[i].num_rows for i in forest.order[node.first : node.last])
            for index, node in enumerate(forest.nodes)
        }

    def decided(self, leaves: Leaves) -> Forest:
        for node in sorted(self._children.keys() - {-1}):
            for child in tuple(self._children[node]):
                length, own = self._tokens(child), self._rows_of(child)
                if length and leaves(self._rows[node], self._tokens(node), own, length):
                    self._leave(child, own)
            below = self._children[node]
            if len(below) < 2:
                for child in tuple(below):
                    self._leave(child, self._rows_of(child))
                self._children[self._parents[node]].remove(node)
                del self._children[node]
        return depth_first(self._forest, self._chains, self._children)

    def _leave(self, child: int, rows: int) -> None:
        node = self._parents[child]
        self._children[node].remove(child)
        self._parents[child] = self._parents[node]
        self._children[self._parents[node]].append(child)
        self._rows[node] -= rows

    def _rows_of(self, child: int) -> int:
        return self._rows[child] if child >= 0 else self._chains[-1 - child].num_rows

    def _tokens(self, child: int) -> int:
        """Return what a child reads beside what its parent does."""
        end = self._forest.nodes[child].end if child >= 0 else len(self._chains[-1 - child].pages)
        parent = self._parents[child]
        return (end - (self._forest.nodes[parent].end if parent >= 0 else 0)) * PAGE_TOKENS


def fasttree(group: int, *, alpha: float = 0.66, beta: float = 0.33, gamma: float = 0.1) -> Leaves:
    """Return FastTree's rule (MLSys 2025): padding of query tiles and of key tiles, and merges."""
    query_tile, key_tile = max(1, 64 // group), 32

    def product(queries: int, keys: int) -> float:
        pad_q = query_tile - ((queries - 1) % query_tile + 1) if queries else 0
        pad_k = max(0, key_tile - keys)
        return alpha * pad_q * group * keys + beta * pad_k * queries * group

    def leaves(queries: int, length: int, own: int, below: int) -> bool:
        split_k = product(queries, length) + product(own, below) + gamma * own
        split_q = product(queries - own, length) + product(own, below + length)
        return split_k > split_q

    return leaves


def pat(group: int, *, most_rows: int = 64) -> Leaves:
    """Return PAT's rule (ASPLOS 2026): tiles saved against four words of merging per query."""
    tile = max(1, most_rows // group)

    def tiles(queries: int) -> int:
        return -(-queries // tile)

    def leaves(queries: int, length: int, own: int, _below: int) -> bool:
        saved = (tiles(queries) - tiles(queries - own) - tiles(own)) * length + 4 * own
        return own == queries or saved >= 0

    return leaves
