"""What an epoch's end does to pages: copies into the public tree, and public pages withdrawn."""

from __future__ import annotations

from dataclasses import replace

from kvkeep.cache.radix import Page
from kvkeep.cache.store import PUBLIC_ACCOUNT, PageStore
from kvkeep.errors import QuotaExceeded
from kvkeep.types import PAGE_TOKENS, PUBLIC_SCOPE, EpochDelta, PageTag, chain_hash


class Promoter:
    """Keeps the public tree in step with the policy's snapshots.

    A public page's parent is public or the root.
    """

    def __init__(self, store: PageStore, public_tag: PageTag) -> None:
        self._store = store
        self._tag = public_tag
        self._tag_digest = public_tag.digest()

    def apply(self, delta: EpochDelta) -> None:
        """Withdraw, then promote what some tenant still holds.

        A page that does not fit stays private.
        """
        for chain in delta.withdrawn:
            self.withdraw(chain)
        wanted = set(delta.promoted)
        if not wanted:
            return
        held = self._own_pages_by_public_hash()
        for page in sorted((held[h] for h in wanted & held.keys()), key=lambda page: page.index):
            self.promote(page)

    def withdraw(self, chain: bytes) -> int:
        """Take a public page and all below it out of the index; return how many."""
        page = self._store.index.public_pages.get(chain)
        if page is None:
            return 0
        count = self._store.drop_below(page)
        self._store.drop(page)
        return count + 1

    def promote(self, page: Page) -> Page | None:
        """Copy a closed page into the public tree and return the copy.

        Its own stays until it is evicted.

        None where its parent is not public, its bytes are not what a public page would hold
        (another codec or shield), or the public share is full of pages in use.
        """
        store = self._store
        hashes = self._public_hashes(page)
        if not hashes or replace(page.tag, scope=PUBLIC_SCOPE) != self._tag:
            return None
        found = store.index.public_pages.get(hashes[-1])
        if found is not None:
            return found
        above = self._public_ancestors(page, hashes)
        if above is None:
            return None
        for ancestor in above:
            store.lock(ancestor)
        copy = self._copy(page, above[-1] if above else None)
        for ancestor in reversed(above):
            store.unlock(ancestor)
        return copy

    def _copy(self, page: Page, parent: Page | None) -> Page | None:
        store = self._store
        try:
            copy = store.new_pages(PUBLIC_ACCOUNT, self._tag, 1)[0]
        except QuotaExceeded:
            return None
        store.pool.copy_page(page.slot, copy.slot)
        copy.state = page.state
        store.attach(self._root() if parent is None else parent, copy, page.key)
        store.unlock(copy)
        return copy

    def _root(self) -> Page:
        index = self._store.index
        return index.root(index.model_digest, PUBLIC_ACCOUNT, self._tag)

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

    def _public_ancestors(self, page: Page, hashes: list[bytes]) -> list[Page] | None:
        """Return the public pages above, the first page first; None where one is missing."""
        if page.index == 0:
            return []
        if len(hashes) > 1:
            start = hashes[-2]
        else:
            start = page.parent.hash if page.parent is not None else b""
        node = self._store.index.public_pages.get(start)
        if node is None:
            return None
        above: list[Page] = []
        while node.parent is not None:
            above.append(node)
            node = node.parent
        return above[::-1]

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
