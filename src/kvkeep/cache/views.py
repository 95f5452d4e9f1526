"""What an open view holds, and how its pages enter the index as they fill."""

from __future__ import annotations

from dataclasses import dataclass

from kvkeep.cache.matching import public_start
from kvkeep.cache.radix import Page, PublicChain, TokenIds
from kvkeep.cache.store import PUBLIC_ACCOUNT, PageStore
from kvkeep.types import PAGE_TOKENS, Int32Array, PageTag, SharingPolicy, View


@dataclass(slots=True)
class OwnTiles:
    """Tiles that a view and its forks hold instead of pages; charged once."""

    account: str
    ids: Int32Array
    pages: int
    """That they count as."""
    views: int = 1


@dataclass(slots=True)
class HeldView:
    """A view and the pages it locks, in order."""

    view: View
    account: str
    pages: list[Page]
    closed: int
    """Leading pages whose closing was seen."""
    prompt_pages: int = 0
    """Full pages of what the tenant sent; offered once they are all there."""
    offered: bool = False
    indexable: bool = True
    apart: int = 0
    """Leading pages of the view that another worker holds, and `pages` lacks."""
    gone: int = 1
    """Pages 1 to `gone` - 1 were let go of; `tiles` hold what is left of them."""
    tiles: OwnTiles | None = None

    def locked(self) -> list[Page]:
        """Return the pages that are held, in order."""
        return self.pages[:1] + self.pages[self.gone :]

    def set_slots(self) -> None:
        """Write the pages' slots into the view."""
        self.view.assign([-1] * self.apart + [page.slot for page in self.pages])

    def clean_tokens(self, count: int) -> int:
        """Return how many of the first `count` tokens may be indexed."""
        tainted = self.view.tainted_from
        if not self.indexable:
            return 0
        return count if tainted is None else min(count, tainted)


class Closer:
    """Indexes the pages of views: full ones as they close, the open one's rows at the end."""

    def __init__(self, store: PageStore, policy: SharingPolicy, public_tag: PageTag) -> None:
        self._store = store
        self._index = store.index
        self._policy = policy
        self._public_tag = public_tag
        self._public_tag_digest = public_tag.digest()
        self._spec = store.pool.spec

    def own_parent(self, before: Page | None, account: str, tag: PageTag) -> Page | None:
        """Return what a private page after `before` hangs below.

        None where that is no longer indexed.
        """
        if before is None:
            return self._index.root(self._index.model_digest, account, tag)
        if not before.attached:
            return None
        if before.account == PUBLIC_ACCOUNT:
            return self._index.root(before.hash, account, tag, before.index)
        return before

    def close_pages(self, held: HeldView, tokens: TokenIds) -> None:
        """Close all full pages and index them as far as nothing is tainted.

        Pages that are only found in blocks are closed in blocks.
        """
        first, last = held.closed, len(tokens) // PAGE_TOKENS
        last = max(first, last - last % self._spec.block_pages)
        clean = held.clean_tokens(last * PAGE_TOKENS) // PAGE_TOKENS
        here = first - held.apart
        keys, before = self._index.keys, held.pages[here - 1].key if here else b""
        raw, size = (
            keys.of(tokens[first * PAGE_TOKENS : last * PAGE_TOKENS], before),
            keys.page_bytes,
        )
        for i in range(first, last):
            page = held.pages[i - held.apart]
            page.state = self._spec.last_state
            if i < clean and not page.attached:
                begin = (i - first) * size
                self._index_page(held, i, raw[begin : begin + size])
        held.closed = last

    def offer(self, held: HeldView, tokens: TokenIds, *, ended: bool) -> None:
        """Offer the prompt's pages to the policy, once: when all are there or the view ends."""
        there = len(tokens) // PAGE_TOKENS
        if held.offered or (there < held.prompt_pages and not ended):
            return
        held.offered = True
        pages = min(held.clean_tokens(len(tokens)) // PAGE_TOKENS, held.prompt_pages)
        if pages:
            start = public_start(self._index, self._policy, held.view.tag.scope)
            chain = PublicChain(start, self._public_tag_digest, tokens, pages, self._index.keys)
            self._policy.offer(chain, held.account)

    def _index_page(self, held: HeldView, i: int, key: bytes) -> None:
        """Index page i of a view, or swap it for its indexed equal.

        It stays private where neither can be.
        """
        page = held.pages[i]
        before = held.pages[i - 1] if i else None
        if self._policy.at_once and self._index_public(held, i, key, before):
            return
        parent = self.own_parent(before, held.account, held.view.tag)
        if parent is None:
            return
        twin = parent.children.get(key)
        if twin is None:
            self._store.attach(parent, page, key)
        else:
            self._swap(held, i, twin)

    def _index_public(self, held: HeldView, i: int, key: bytes, before: Page | None) -> bool:
        """Index a page below public ones or the root.

        False where its parent is private or no room is left.
        """
        if before is not None and not (before.attached and before.account == PUBLIC_ACCOUNT):
            return False
        digest = public_start(self._index, self._policy, held.view.tag.scope)
        start = (digest, PUBLIC_ACCOUNT, self._public_tag)
        parent = self._index.find_root(*start) if before is None else before
        twin = None if parent is None else parent.children.get(key)
        if twin is not None:
            self._swap(held, i, twin)
            return True
        page = held.pages[i]
        if not self._store.charge_public(page):
            return False
        self._store.attach(self._index.root(*start) if before is None else before, page, key)
        return True

    def _swap(self, held: HeldView, i: int, twin: Page) -> None:
        self._store.lock(twin)
        self._store.unlock(held.pages[i])
        held.pages[i] = twin
        held.view.replace(i, twin.slot)

    def keep_rows(self, held: HeldView, tokens: TokenIds) -> None:
        """Index the open page's rows as a partial leaf.

        Not where some page already begins with them, or keys would hide which rows they are.
        """
        clean = held.clean_tokens(len(tokens))
        full, rows = divmod(clean, PAGE_TOKENS)
        if not rows or self._spec.window_tokens is not None or full >= len(held.pages):
            return
        if not self._index.keys.rows:
            return
        if held.gone > 1 and full <= held.gone:
            return
        page = held.pages[full]
        if page.attached or page.ref_count > 1:
            return
        before = held.pages[full - 1] if full else None
        parent = self.own_parent(before, held.account, held.view.tag)
        if parent is None:
            return
        key = self._index.keys.of(tokens[full * PAGE_TOKENS : clean])
        found = self._index.longest_partial(parent, key)
        if found is None or found[1] < rows:
            self._store.attach(parent, page, key)
