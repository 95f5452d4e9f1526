"""The cache as the engine sees it: match, open a view, make room, commit, release.

    match ── pending? ── begin_fetch ─ poll ─ end_fetch ─┐
      └────────────────── open_view <─── match again ────┘
                              │
              ┌─ extend ─> (forward) ─> commit ─┐      fork: the same for n > 1
              └─────────────────────────────────┴──> release

A view's chain is public pages first, then pages of its own scope: [pub pub pub own own open]. Its
own pages hang below the public page they continue, so every page's chain hash binds exactly what
was read to compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvkeep.cache.accounts import CacheStats, Forgotten, Retention
from kvkeep.cache.below import Below
from kvkeep.cache.epochs import Promoter
from kvkeep.cache.fetch import Fetch
from kvkeep.cache.hold import Holds
from kvkeep.cache.losses import Losses
from kvkeep.cache.matching import Match, Matcher
from kvkeep.cache.packing import Packing
from kvkeep.cache.parts import Pages
from kvkeep.cache.radix import Page, RadixIndex, TokenIds, path_to
from kvkeep.cache.store import PUBLIC_ACCOUNT, PageStore
from kvkeep.cache.tiers import Tier
from kvkeep.cache.views import Closer, HeldView
from kvkeep.errors import CapacityError, EngineError
from kvkeep.types import (
    PAGE_TOKENS,
    PUBLIC_SCOPE,
    EpochDelta,
    PageTag,
    SharingPolicy,
    View,
)


class CacheManager:
    """Owns every page; an account's results depend on its own calls and the public tree alone.

    Not thread-safe: one thread (the engine's) calls it.
    """

    def __init__(
        self,
        pool: Pages,
        index: RadixIndex,
        policy: SharingPolicy,
        tag_of: Callable[[str], PageTag],
        tier: Tier | None = None,
        *,
        order: bytes = b"",
        first_view: int = 0,
    ) -> None:
        """`first_view`: where the numbers of its views begin; `order`: see `Below`."""
        self.pool = pool
        self.index = index
        self._policy = policy
        self.below = None if tier is None else Below(tier, pool, index, order)
        self._store = PageStore(pool, index, self.below)
        public_tag = tag_of(PUBLIC_SCOPE)
        self._matcher = Matcher(index, policy, tag_of, self.below, pool.spec)
        self._closer = Closer(self._store, policy, public_tag)
        self._tag_of = tag_of
        self._promoter = Promoter(self._store, public_tag, policy, self.below)
        self._held: dict[int, HeldView] = {}
        self.packing = Packing(self._store, self._held)
        self.holds = Holds(self._store)
        self.losses = Losses(self._store)
        self._fetches: set[Fetch] = set()
        self._next_view = first_view

    # Shares

    def set_quotas(self, quotas: Mapping[str, int], public_pages: int) -> None:
        """Set each account's share in pages.

        What no longer fits and is not in use is evicted at once.

        Raises `ConfigError` where the shares exceed the pool.
        """
        self._store.set_quotas(quotas, public_pages)

    def set_retention(self, terms: Mapping[str, Retention]) -> None:
        """Say how long accounts keep pages; one that is left out keeps them as long as they fit."""
        for name, owner in self._store.accounts.items():
            owner.retention = terms.get(name, Retention())

    def fits(self, account: str, num_pages: int) -> bool:
        """Tell whether an account could ever hold this many pages at once."""
        owner = self._store.accounts.get(account)
        return owner is not None and num_pages <= owner.quota_pages

    def room(self, account: str) -> int:
        """Return the new pages an account could hold now, evicting all it does not use."""
        return max(self._store.share(account).room_pages, 0)

    def has_room(self, match: Match, n_tokens: int) -> bool:
        """Tell whether a view of a match and so many tokens in all would find room now."""
        there = sum(p.ref_count > 0 or p.account == PUBLIC_ACCOUNT for p in match.attached())
        return -(-n_tokens // PAGE_TOKENS) - there <= self.room(match.account)

    def used(self, account: str) -> int:
        """Return the pages charged to an account, in use or cached."""
        return self._store.share(account).used_pages

    def findable_pages(self, n_tokens: int) -> int:
        """Return how many whole pages of so many tokens can be found again."""
        pages = n_tokens // PAGE_TOKENS
        return pages - pages % self.pool.spec.block_pages

    @property
    def public_pages(self) -> int:
        """Return the pages that are public now."""
        return len(self.index.public_pages)

    def evict_pages(self, account: str, count: int) -> int:
        """Evict up to `count` of an account's unused pages, oldest first; return how many."""
        return self._store.evict_pages(account, count)

    def stats(self) -> CacheStats:
        """Return counts; they are global, so for the operator only."""
        return self._store.stats(len(self._held))

    # Matching and fetching

    def match(self, tokens: TokenIds, *, account: str, scope: str) -> Match:
        """Return the longest cached start of a prompt, see `Matcher.match`."""
        return self._matcher.match(tokens, account=account, scope=scope)

    def begin_fetch(self, match: Match, tokens: TokenIds) -> Fetch | None:
        """Start to fetch a match's pending pages, as many as the account has room for.

        None where none. Ask `Fetch.done` after `poll`, then `end_fetch` and match again. `tokens`
        are those that were matched.
        """
        prefix = match.attached()
        whole = len(prefix) == len(match.public) + len(match.own)
        if self.below is None or not whole or not match.pending:
            return None
        for page in prefix:
            self._store.lock(page)
        try:
            fetch = self._reserve(match, prefix, tokens)
        finally:
            for page in reversed(prefix):
                self._store.unlock(page)
        if fetch is not None:
            self._fetches.add(fetch)
            fetch.start(self.below, match.pending)
        return fetch

    def poll(self) -> None:
        """Let the tier run what is due."""
        if self.below is not None:
            self.below.poll()

    def end_fetch(self, fetch: Fetch) -> None:
        """End a fetch, done or not; what arrived stays cached."""
        if fetch not in self._fetches:
            raise EngineError("this fetch has ended before")
        self._fetches.remove(fetch)
        fetch.end()
        self._store.trim(fetch.account)

    # Views

    def open_view(
        self,
        match: Match,
        prompt_len: int,
        *,
        answer_tokens: int | None = None,
        heard_of: bool = True,
    ) -> View:
        """Return a view of what a match found, its pages locked.

        A page evicted since then ends it sooner, at the block before it. The snapshot's pages
        become pages of the view's own, charged to its account, where there is room for the whole
        prompt.

        `View.length` says how much of the prompt it holds: all of it where all was cached. Rows of
        a partial match are copied to a page of the view's own; where the account has no room for it
        they are left out. The policy hears of it, unless nobody asked for it: a guard's probe.
        """
        pages = match.attached()
        pages = pages[: len(pages) - len(pages) % self.pool.spec.block_pages]
        public = sum(page.account == PUBLIC_ACCOUNT for page in pages)
        for page in pages:
            self._store.lock(page)
        view = View(self._next_view, match.tag)
        self._next_view += 1
        held = HeldView(
            view, match.account, pages, len(pages), prompt_pages=prompt_len // PAGE_TOKENS
        )
        whole = len(pages) == len(match.public) + len(match.own)
        served = [page.hash for page in pages[:public]]
        rows = 0
        if whole and match.snapshot and self._add_snapshot(held, match, prompt_len):
            served = [page.hash for page in path_to(match.snapshot[-1])]
        elif whole and match.partial is not None:
            rows = self._copy_rows(held, *match.partial)
        held.set_slots()
        full = len(held.pages) - (rows > 0)
        view.length = min(full * PAGE_TOKENS + rows, prompt_len)
        self._held[view.id] = held
        if heard_of:
            owner = self._store.share(held.account)
            at, owner.clock = owner.clock, owner.clock + 1
            self._policy.observe(match.access(at, prompt_len, tuple(served), answer_tokens))
        return view

    def reserve_view(self, n_tokens: int, *, account: str, scope: str, apart: int = 0) -> View:
        """Return a view with room for `n_tokens`, observed by nobody and never indexed.

        It is empty but for `apart` pages that others hold. Raises what `extend` does.
        """
        view = View(self._next_view, self._tag_of(scope), tainted_from=0, apart=apart)
        view.length, count = apart * PAGE_TOKENS, -(-n_tokens // PAGE_TOKENS) - apart
        pages = self._store.new_pages(account, view.tag, count, at=apart)
        self._next_view += 1
        held = HeldView(view, account, pages, apart, offered=True, indexable=False, apart=apart)
        held.set_slots()
        self._held[view.id] = held
        return view

    def extend(self, view: View, n_tokens: int) -> None:
        """Make room for `n_tokens` after `view.length`, evicting unused pages of its account.

        Raises `QuotaExceeded` or `PoolExhausted`; the view is as before then.
        """
        needed = -(-(view.length + n_tokens) // PAGE_TOKENS) - view.num_pages
        if needed <= 0:
            return
        held = self._require(view)
        for page in self._store.new_pages(held.account, view.tag, needed, at=view.num_pages):
            held.pages.append(page)
            view.push(page.slot)

    def commit(self, view: View, tokens: TokenIds) -> None:
        """Say which tokens' K and V the view holds from 0 on.

        Full pages are indexed and `length` is set.

        A page equal to one that is indexed already is swapped for it, so slots of full pages may
        change.
        """
        held = self._require(view)
        if len(tokens) > view.num_pages * PAGE_TOKENS:
            raise EngineError(
                f"view {view.id} has no room for {len(tokens)} tokens: extend it first"
            )
        view.length = len(tokens)
        if len(tokens) // PAGE_TOKENS > held.closed:
            self._closer.close_pages(held, tokens)
        self._closer.offer(held, tokens, ended=False)

    def fork(self, view: View) -> View:
        """Return a second view of the same tokens: full pages shared, an open page copied.

        Raises `QuotaExceeded` or `PoolExhausted` where there is no room for the copy.
        """
        held = self._require(view)
        full, rows = divmod(view.length, PAGE_TOKENS)
        pages = held.pages[:full]
        if rows:
            copy = self._store.new_pages(held.account, view.tag, 1, at=full)[0]
            self.pool.copy_page(held.pages[full].slot, copy.slot)
            pages.append(copy)
        twin = View(self._next_view, view.tag, length=view.length, tainted_from=view.tainted_from)
        twin.evict, twin.packed = None if view.evict is None else view.evict.copy(), view.packed
        self._next_view += 1
        copy_held = HeldView(
            twin, held.account, pages, min(held.closed, full), 0, True, held.indexable
        )
        self.packing.share(held, copy_held)
        for page in copy_held.locked()[: -1 if rows else None]:
            self._store.lock(page)
        copy_held.set_slots()
        self._held[twin.id] = copy_held
        return twin

    def release(self, view: View, tokens: TokenIds) -> None:
        """End a view; what `tokens` vouch for stays cached, the open page as a partial leaf."""
        held = self._require(view)
        del self._held[view.id]
        if len(tokens) // PAGE_TOKENS > held.closed:
            self._closer.close_pages(held, tokens)
        self._closer.offer(held, tokens, ended=True)
        self._closer.keep_rows(held, tokens)
        for page in reversed(held.locked()):
            self._store.unlock(page)
        held.pages = []
        self.packing.drop(held)
        self._store.trim(held.account)

    # Forgetting and sharing

    def drop_scope(self, account: str, scope: str) -> int:
        """Drop a scope's pages, and its account's below memory; its views leave nothing behind."""
        return self._drop_trees(account, scope)

    def forget(self, account: str) -> Forgotten:
        """Drop every page of an account and all its policy state."""
        votes = self._policy.forget(account)
        return Forgotten(self._drop_trees(account, None), votes)

    def end_epoch(self, now: float) -> EpochDelta:
        """Close the policy's epoch, drop what has had its time and apply the snapshot."""
        delta = self._policy.end_epoch(now)
        self.apply(delta, now)
        return delta

    def apply(self, delta: EpochDelta, now: float) -> None:
        """Drop what has had its time by `now` and apply a snapshot."""
        self._store.expire(now)
        self._promoter.apply(delta)

    def promote(self, page: Page, *, pinned: bool = False) -> Page | None:
        """Publish one page; see `Promoter.promote`."""
        return self._promoter.promote(page, pinned=pinned)

    # Inside

    def _require(self, view: View) -> HeldView:
        held = self._held.get(view.id)
        if held is None or held.view is not view:
            raise EngineError(f"view {view.id} is not open: it was released, or is another's")
        return held

    def _reserve(self, match: Match, prefix: list[Page], tokens: TokenIds) -> Fetch | None:
        """Return a fetch with a page for each pending one that there is room for."""
        count = min(len(match.pending), self.room(match.account))
        owner = self._store.accounts.get(match.account)
        if owner is None or count <= 0 or not owner.has_room(count, first=not prefix):
            return None
        first, size = len(prefix), self.index.keys.page_bytes
        raw = self.index.keys.of(tokens[: (first + count) * PAGE_TOKENS])
        keys = [raw[begin : begin + size] for begin in range(first * size, len(raw), size)]
        pages = self._store.new_pages(match.account, match.tag, count, at=len(prefix))
        before = prefix[-1] if prefix else None

        def parent() -> Page | None:
            return self._closer.own_parent(before, match.account, match.tag)

        return Fetch(self._store, prefix, parent, pages, keys)

    def _copy_rows(self, held: HeldView, source: Page, rows: int) -> int:
        """Copy the page of a partial match into a new open page.

        Return the rows it gives, 0 without room.
        """
        if not source.attached:
            return 0
        self._store.lock(source)
        try:
            at = len(held.pages)
            page = self._store.new_pages(held.account, held.view.tag, 1, at=at)[0]
        except CapacityError:
            return 0
        else:
            self.pool.copy_page(source.slot, page.slot)
            held.pages.append(page)
            return rows
        finally:
            self._store.unlock(source)

    def _add_snapshot(self, held: HeldView, match: Match, prompt_len: int) -> bool:
        """Give a view the snapshot's pages as its own, moving what computing them would move.

        False without room for the whole prompt: then it is not to be served now.
        """
        needed = -(-prompt_len // PAGE_TOKENS) - len(held.pages)
        owner = self._store.accounts.get(held.account)
        if owner is None or not owner.has_room(needed, first=not held.pages):
            return False
        if match.partial is not None and match.partial[0].attached:
            self._store.lock(match.partial[0])
            self._store.unlock(match.partial[0])
        held.pages += self._store.share_pages(held.account, held.view.tag, match.snapshot)
        return True

    def _drop_trees(self, account: str, scope: str | None) -> int:
        """Drop an account's trees, all or one scope's; nothing in flight is indexed after it."""
        for held in self._held.values():
            if held.account == account and scope in (None, held.view.tag.scope):
                held.indexable = False
        for fetch in self._fetches:
            if fetch.account == account and scope in (None, fetch.scope):
                fetch.give_up()
        dropped = 0 if self.below is None else self.below.forget(account)
        for root in self.index.roots():
            if root.account == account and scope in (None, root.tag.scope):
                dropped += self._store.drop_below(root)
        self._store.trim(account)
        return dropped
