"""What an epoch's end does to pages: copies into the public tree, and public pages withdrawn."""

from __future__ import annotations

from dataclasses import replace

from kvkeep.cache.below import Below
from kvkeep.cache.radix import Page
from kvkeep.cache.recall import Recall, hang
from kvkeep.cache.store import PUBLIC_ACCOUNT, PageStore
from kvkeep.types import (
    PAGE_TOKENS,
    PUBLIC_SCOPE,
    EpochDelta,
    PageKind,
    PageTag,
    SharingPolicy,
    chain_hash,
)


class Promoter:
    """Keeps the public tree in step with the policy's snapshots.

    A public page's parent is public or the root. Between two epochs' ends no public page comes or
    goes: what does not fit in the public share is not published, and nothing is evicted for it.
    """

    def __init__(
        self, store: PageStore, public_tag: PageTag, policy: SharingPolicy, below: Below | None
    ) -> None:
        self._store = store
        self._at_once = policy.at_once
        lasting = below is not None and not (policy.at_once or policy.by_scope)
        self._recall = Recall(store, below, public_tag) if lasting and below is not None else None
        self._tag = public_tag
        self._tag_digest = public_tag.digest()

    def apply(self, delta: EpochDelta) -> None:
        """Withdraw, then promote in the delta's order what some tenant still holds.

        A page that does not fit stays private.
        """
        for chain in delta.withdrawn:
            self.withdraw(chain)
        if self._recall is not None:
            self._recall.arrive(frozenset(delta.promoted))
        public = self._store.index.public_pages
        missing = [chain for chain in delta.promoted if chain not in public]
        held = self._own_pages_by_public_hash() if missing else {}
        for chain in missing:
            page = held.get(chain)
            if page is not None:
                self.promote(page)
        if self._recall is not None:
            self._recall.settle(delta.promoted)

    def withdraw(self, chain: bytes) -> int:
        """Take a public page and all below it out of the index; return how many.

        A pinned page stays.
        """
        page = self._store.index.public_pages.get(chain)
        if page is None or (page.pinned and not self._at_once):
            return 0
        count = self._store.drop_below(page)
        self._store.drop(page)
        return count + 1

    def promote(self, page: Page, *, pinned: bool = False) -> Page | None:
        """Publish a full page and return its public twin, which shares its memory.

        Its own stays until it is evicted. `pinned`: in the open, see `Page`. None where its parent
        is not public, its bytes are not what a public page would hold (another codec or shield), or
        the public share is full.
        """
        store = self._store
        hashes = self._public_hashes(page)
        if not hashes or replace(page.tag, scope=PUBLIC_SCOPE) != self._tag:
            return None
        found = store.index.public_pages.get(hashes[-1])
        if found is None:
            found = self._publish(page, hashes)
        if found is not None and pinned and not found.pinned:
            found.pinned = True
            self._store.keep(found)
        return found

    def _publish(self, page: Page, hashes: list[bytes]) -> Page | None:
        store = self._store
        public = store.account(PUBLIC_ACCOUNT)
        if public.is_full(first=page.kind is PageKind.FIRST):
            return None
        parent: Page | None = None
        if page.index > 0:
            start = page.parent.hash if len(hashes) == 1 and page.parent else hashes[-2]
            parent = store.index.public_pages.get(start)
            if parent is None:
                return None
        twin = store.share_pages(PUBLIC_ACCOUNT, self._tag, [page])[0]
        hang(store, self._tag, twin, page.key, parent)
        return twin

    def _public_hashes(self, page: Page) -> list[bytes]:
        """Return the public hashes of a page's chain from its tree's root down.

        Empty for what cannot be public.
        """
        if not page.attached or page.n_tokens < PAGE_TOKENS:
            return []
        keys: list[bytes] = []
        node = page
        while node.parent is not None:
            keys.append(node.key)
            node = node.parent
        hashes, last = [], node.hash
        for key in reversed(keys):
            last = chain_hash(last, self._tag_digest, key)
            hashes.append(last)
        return hashes

    def _own_pages_by_public_hash(self) -> dict[bytes, Page]:
        """Return every private full page by the hash it would have in the public tree."""
        found: dict[bytes, Page] = {}
        for root in self._store.index.roots():
            if root.tag.scope == PUBLIC_SCOPE:
                continue
            stack = [(root.hash, child) for child in root.children.values()]
            while stack:
                above, page = stack.pop()
                chain = chain_hash(above, self._tag_digest, page.key)
                found.setdefault(chain, page)
                stack.extend((chain, child) for child in page.children.values())
        return found
