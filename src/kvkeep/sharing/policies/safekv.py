"""`safekv`: the published policy, faithful, as a baseline. It is not safe.

Source: SafeKV (2508.08438), with the constants of its authors' second implementation: a page is
private until a detector has cleared it, then anyone's, until `budget` hits by others; then it is
kept shared where `creators` accounts have sent it, the prober's own among them, else private for
ever. What the detector misses is public after one prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvkeep.sharing.inspection import DecodeText, Inspector, cleared_units
from kvkeep.sharing.members import Directory
from kvkeep.types import PAGE_TOKENS, Access, Chain, EpochDelta

WINDOW_GROWTH = 10
"""The first implementation's threshold: hits, and hits per user, over those of the last window."""


@dataclass(slots=True)
class _Node:
    """One page's entry, as published."""

    creators: set[str] = field(default_factory=set)
    private: bool = True
    for_ever: bool = False
    budget: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    hits_before: int = 0
    users_before: int = 0


class SafeKV:
    """Shares what a detector clears; watches each page's hits. Unsafe."""

    at_once = True
    by_scope = False

    def __init__(
        self,
        directory: Directory,
        decode: DecodeText,
        inspector: Inspector,
        budget: int = 10,
        creators: int = 2,
    ) -> None:
        self._directory = directory
        self._decode = decode
        self._inspector = inspector
        self._budget = budget
        self._creators = creators
        self._nodes: dict[bytes, _Node] = {}
        self._epoch = 0

    def public_len(self, chain: Sequence[bytes], tenant: str) -> int:
        """Return the leading pages that are shared or that this account sent itself."""
        user = self._directory.voter(tenant)
        for i, page in enumerate(chain):
            node = self._nodes.get(page)
            if node is None or (node.private and user not in node.creators):
                return i
        return len(chain)

    def offer(self, chain: Chain, tenant: str) -> None:
        """Note who sent each page, and scan those that are new."""
        user = self._directory.voter(tenant)
        pages = tuple(chain)
        new = [page for page in pages if page not in self._nodes]
        for page in pages:
            self._nodes.setdefault(page, _Node(budget=self._budget)).creators.add(user)
        if not new:
            return
        clear = cleared_units(chain.token_ids(), PAGE_TOKENS, self._decode, self._inspector)
        for page in pages[:clear]:
            node = self._nodes[page]
            node.private = node.for_ever

    def observe(self, access: Access) -> None:
        """Spend a page's budget with each hit by an account that did not send it."""
        user = self._directory.voter(access.tenant)
        for page in access.public_chain:
            node = self._nodes[page]
            node.hits[user] += 1
            if user in node.creators:
                continue
            node.budget -= 1
            if node.budget > 0:
                continue
            if len(node.creators) >= self._creators:
                node.budget = self._budget
            else:
                node.private = node.for_ever = True

    def end_epoch(self, now: float) -> EpochDelta:
        """Close a window: pages whose hits and hits per user both leapt are thrown away."""
        self._epoch += 1
        gone = [page for page, node in self._nodes.items() if _leapt(node)]
        for page in gone:
            del self._nodes[page]
        for node in self._nodes.values():
            node.hits_before, node.users_before = node.hits.total(), len(node.hits)
            node.hits.clear()
        return EpochDelta(self._epoch, withdrawn=tuple(gone))

    def forget(self, tenant: str) -> int:
        """Drop an account from the creators of all pages; return how many."""
        user = self._directory.voter(tenant)
        count = sum(user in node.creators for node in self._nodes.values())
        for node in self._nodes.values():
            node.creators.discard(user)
        return count


def _leapt(node: _Node) -> bool:
    """Tell whether hits and hits per user both grew more than tenfold since the last window."""
    if not node.hits_before or not node.hits:
        return False
    now, before = node.hits.total() / len(node.hits), node.hits_before / node.users_before
    much_more = node.hits.total() > WINDOW_GROWTH * node.hits_before
    return much_more and now >= WINDOW_GROWTH * before
