"""The published prefix trees, laid out in pages of 64 tokens.

CoDec: five sweeps of its kernel benchmark (T scaled to memory). FastTree: fifteen trees. PAT: three
forests and two batches that share nothing. A level is written as how many nodes it has and how
many tokens each holds; children are dealt evenly to parents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvkeep.types import PAGE_TOKENS


class Tree(NamedTuple):
    """One cell of a grid: nodes per level and tokens per node of a level."""

    name: str
    nodes: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The pages of a tree's requests: what a paged cache shares of it."""

    slots: list[list[int]]
    """Page slots of each request, in order."""
    lengths: list[int]
    pages: int
    """Distinct pages."""


def laid_out(tree: Tree) -> Layout:
    """Return the requests' pages; a page is shared where all its tokens are."""
    slots: list[list[int]] = []
    lengths: list[int] = []
    ids: dict[tuple[int, int, int], int] = {}
    leaves = tree.nodes[-1]
    for leaf in range(leaves):
        path = [leaf * count // leaves for count in tree.nodes]
        ends, at = [], 0
        for tokens in tree.tokens:
            at += tokens
            ends.append(at)
        own = []
        for page in range(-(-at // PAGE_TOKENS)):
            last = min((page + 1) * PAGE_TOKENS, at) - 1
            level = next(i for i, end in enumerate(ends) if last < end)
            if (page + 1) * PAGE_TOKENS > at:
                level = len(ends) - 1  # a page in part is its request's own
            own.append(ids.setdefault((level, path[level], page), len(ids)))
        slots.append(own)
        lengths.append(at)
    return Layout(slots, lengths, len(ids))


def codec(scale_tokens: int) -> list[Tree]:
    """Return CoDec's sweeps: sequence, batch, depth, ratio of shared tokens, shape."""
    trees = [
        Tree(f"seq leaf {n}", (1, 2, 4, 8), (4096, 0, 0, n)) for n in (128, 256, 512, 1024, 2048)
    ]
    trees += [Tree(f"batch {n}", (1, n), (2048, 2048)) for n in (4, 8, 16, 32, 64)]
    trees += [Tree(f"batch {n} long", (1, n), (scale_tokens, 2048)) for n in (4, 8, 16, 32, 64)]
    trees += [
        Tree(f"depth {d}", tuple(2**i for i in range(d)), (1024,) * d) for d in (2, 3, 4, 5, 6)
    ]
    for share in (0.05, 0.1, 0.2, 0.5, 0.8):
        total, batch = scale_tokens, 16
        shared = int(share * batch * total / (1 + share * (batch - 1))) // 64 * 64
        trees.append(Tree(f"ratio {share}", (1, batch), (shared, total - shared)))
    trees += [Tree(f"shape {k}", (1, k, k * k), (1024,) * 3) for k in (2, 3, 4, 5)]
    return trees


_CHAIN: Final = ((1, 2, 4, 8, 16, 32, 64, 128, 1024), (16,) * 9)
FASTTREE: Final = tuple(
    Tree("fasttree " + ",".join(map(str, nodes)), nodes, tokens)
    for nodes, tokens in (
        ((1, 2, 64), (8, 256, 32)),
        ((1, 4, 256), (8, 256, 32)),
        ((1, 4, 8, 256), (8, 256, 256, 32)),
        ((1, 256), (256, 32)),
        ((1, 1024), (2048, 32)),
        ((1, 16, 64), (1024, 256, 32)),
        ((1, 4, 16, 512), (1024, 256, 128, 32)),
        ((1, 4, 16, 64, 256, 1024), (256, 8, 256, 64, 32, 256)),
        ((1, 10), (4000, 400)),
        _CHAIN,
        (_CHAIN[0], (256, 128, 64, 16, 16, 16, 16, 16, 16)),
        ((1, 8, 16, 32, 64, 128, 1024), (256, 128, 64, 16, 16, 16, 16)),
        ((1, 8, 16, 32, 64, 256, 1024), (256, 128, 64, 16, 16, 16, 16)),
        ((1, 16, 32, 64, 128, 1024), (256, 128, 64, 16, 16, 16)),
        ((1, 16, 32, 64, 256, 1024), (256, 128, 64, 16, 16, 16)),
    )
)

PAT: Final = tuple(
    Tree("pat " + ",".join(map(str, nodes)), nodes, tokens)
    for nodes, tokens in (
        ((2, 8, 16, 256), (256, 256, 32, 32)),
        ((4, 16, 256, 512), (512, 32, 128, 32)),
        ((8, 16, 32, 256), (512, 512, 256, 32)),
    )
)

UNSHARED: Final = (
    Tree("unshared 256 x 1024", (256,), (1024,)),
    Tree("unshared 64 x 4096", (64,), (4096,)),
)


def flat_tokens(layout: Layout) -> int:
    """Return the tokens that are attended, request by request."""
    return sum(layout.lengths)


def flat_pages(slots: Sequence[Sequence[int]]) -> int:
    """Return the pages that are read if every request reads its own."""
    return sum(map(len, slots))
