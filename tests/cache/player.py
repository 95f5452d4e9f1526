"""Drives a cache manager with small operations and checks every rule that must always hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvkeep.cache.classes import Beside
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.pool import TilePool
from kvkeep.cache.radix import TOKEN_KEYS, Page, PageKeys, RadixIndex, TokenIds
from kvkeep.cache.store import PUBLIC_ACCOUNT
from kvkeep.cache.tiers import Tier
from kvkeep.cache.views import OwnTiles
from kvkeep.errors import CapacityError
from kvkeep.sharing.policy import ShareNothing, SharingPolicy
from kvkeep.types import (
    PAGE_TOKENS,
    Int32Array,
    Layout,
    PageKind,
    PageSpec,
    PageTag,
    UInt64Array,
    View,
    chain_hash,
)

SPEC = PageSpec(Layout.F32, num_layers=2, num_kv_heads=2, head_dim=8, tile_bytes=4096)
DIGEST = b"m" * 32
Marks = UInt64Array


def tiles_of(pool: TilePool) -> NDArray[np.uint8]:
    """Return a host pool's tiles [N, tile_bytes], as they are in memory."""
    tiles: NDArray[np.uint8] = pool.buffer.numpy().reshape(-1, pool.spec.tile_bytes)
    return tiles


def pool_of(manager: CacheManager) -> TilePool:
    """Return the pool of a manager that has one of its own."""
    assert isinstance(manager.pool, TilePool)
    return manager.pool


def tag_of(scope: str) -> PageTag:
    return PageTag(scope)


def make_manager(
    num_pages: int = 32,
    policy: SharingPolicy | None = None,
    tier: Tier | None = None,
    spec: PageSpec = SPEC,
    num_first: int = 0,
    keys: PageKeys = TOKEN_KEYS,
) -> CacheManager:
    chosen = ShareNothing() if policy is None else policy
    beside = Beside(num_first, 0, 0) if num_first else None
    pool = TilePool(spec, num_pages, beside=beside)
    return CacheManager(pool, RadixIndex(DIGEST, keys), chosen, tag_of, tier)


def prompt(*blocks: int, tail: int = 0) -> list[int]:
    """Return one page per block, filled with its number, and `tail` tokens more."""
    return [b for b in blocks for _ in range(PAGE_TOKENS)] + [900 + i for i in range(tail)]


def row_marks(tokens: TokenIds) -> Marks:
    """Return what stands for each row's K and V: a number that depends on all tokens so far."""
    powers = np.cumprod(np.full(len(tokens), 6364136223846793005, np.uint64))
    return np.cumsum((np.asarray(tokens, np.uint64) + np.uint64(1)) * powers, dtype=np.uint64)


def fill(manager: CacheManager, view: View, tokens: TokenIds, first: int) -> None:
    """Stand in for a forward pass: write the marks of rows `first` to the end in every tile."""
    _rows(manager, view, first, len(tokens), row_marks(tokens)[first:])


def check_rows(manager: CacheManager, view: View, tokens: TokenIds) -> None:
    """Check that every row the view claims holds what its tokens call for, packed ones aside."""
    first = 0 if view.packed is None else view.packed.end * PAGE_TOKENS
    marks = row_marks(tokens[: view.length])[first:]
    stored = _rows(manager, view, first, view.length)
    assert (stored == marks[:, None]).all()


def _rows(
    manager: CacheManager, view: View, first: int, last: int, marks: Marks | None = None
) -> Marks:
    """Return [rows, tiles] marks as stored, after writing `marks` where they are given."""
    at = np.arange(first, last)
    tiles = (
        pool_of(manager)
        .tile_table[view.pages()[at // PAGE_TOKENS]]
        .reshape(len(at), manager.pool.spec.tiles_per_page)
    )
    words = pool_of(manager).buffer.numpy().view(np.uint64)
    unit_words = pool_of(manager).layer_kv(0).unit_bytes // words.itemsize
    where = tiles.astype(np.int64) * unit_words + (at % PAGE_TOKENS)[:, None]
    if marks is not None:
        words[where] = marks[:, None]
    found: Marks = words[where]
    return found


def indexed_pages(manager: CacheManager) -> list[Page]:
    index = manager.index
    return [page for root in index.roots() for page in index.leaves_first(root)]


def check(manager: CacheManager) -> None:
    """Check every rule that must hold between operations."""
    index, accounts = manager.index, manager._store.accounts
    indexed = indexed_pages(manager)
    assert len(set(indexed)) == len(indexed), "a page is reachable twice"
    refs: Counter[Page] = Counter()
    for held in manager._held.values():
        refs.update(held.locked())
        slots = held.view.pages().tolist()
        assert [page.slot for page in held.locked()] == slots[:1] + slots[held.gone :]
    for fetch in manager._fetches:
        refs.update([entry.page for entry in fetch._incoming] + fetch._prefix)
    refs.update(manager._store._kept)
    pages = set(indexed) | set(refs)
    assert {page.ref_count for page in pages - set(refs)} <= {0}
    assert all(page.ref_count == count for page, count in refs.items())
    for root in index.roots():
        assert root.children or root.partials, "an empty tree stays"
        for page in index.leaves_first(root):
            assert page.attached
            assert (page.account, page.tag) == (root.account, root.tag)
            assert page.parent is not None
            assert page.hash == chain_hash(page.parent.hash, page.tag.digest(), page.key)
            assert (page.n_tokens == PAGE_TOKENS) == (page.parent.children.get(page.key) is page)
    tiles = {id(held.tiles): held.tiles for held in manager._held.values() if held.tiles}
    check_tiles(manager, pages, list(tiles.values()))
    per_page = manager.pool.spec.tiles_per_page
    for name, account in accounts.items():
        mine = {page for page in pages if page.account == name}
        own = sum(-(-len(t.ids) // per_page) for t in tiles.values() if t.account == name)
        assert account.used_pages == len(mine) + own
        first = {page for page in mine if page.kind is PageKind.FIRST}
        assert account.used_first == len(first)
        assert account.unreferenced_first == sum(page.ref_count == 0 for page in first)
        order = list(account.unreferenced)
        assert set(order) == {page for page in mine if page.ref_count == 0}
        assert not account.over_quota or not order
        place = {page: i for i, page in enumerate(order)}
        for page in order:
            for child in (*page.children.values(), *page.partials.values()):
                assert place[child] < place[page], "a parent would be evicted before its child"


def check_tiles(manager: CacheManager, pages: set[Page], tiles: list[OwnTiles]) -> None:
    """Check that every tile is free, in exactly one page or in one view and its forks."""
    pool = pool_of(manager)
    slots = sorted({page.slot for page in pages})
    holders = Counter(page.slot for page in pages)
    assert all(pool._holders[slot] == n for slot, n in holders.items())
    for own in pool._classes:
        mine = [slot for slot in slots if 0 <= slot - own.first_slot < own.num_pages]
        held = own is pool._class(PageKind.PLAIN)
        private = np.concatenate([t.ids for t in tiles if held] or [np.zeros(0, np.int32)])
        for part in own.parts:
            owned = part.range.numbers(pool.tile_table[mine][:, part.where].ravel()).tolist()
            owned += part.range.numbers(private[part.range.holds(private)]).tolist()
            free = part.tiles._stack[: len(part.tiles)].tolist()
            assert sorted(owned + free) == list(range(part.range.num_tiles))
    taken = -(-sum(len(held.ids) for held in tiles) // pool.spec.tiles_per_page)
    assert len(slots) + taken + pool.free_pages == pool.num_pages
    for page in pages:
        first = page.kind is PageKind.FIRST
        assert pool._require(page.slot) is pool._class(page.kind)
        assert first == (pool.num_first > 0 and page.index == 0) or not page.attached


def _staying(view: View, need: Int32Array) -> Int32Array:
    """Return `need` [L, Hkv] tiles as `Packing.resize` takes them: the first ones as they were."""
    held = np.zeros_like(need) if view.packed is None else (view.packed.tiles >= 0).sum(0)
    at = np.arange(need.max(initial=0), dtype=np.int32)[:, None, None]
    return np.where(at < need, np.where(at < held, at, -1), -2).astype(np.int32)


@dataclass
class Running:
    """One view with the tokens whose K and V it holds."""

    account: str
    view: View
    tokens: list[int]


@dataclass
class Player:
    """Plays operations; a transcript per account of all that the account can see."""

    manager: CacheManager
    running: dict[str, list[Running]] = field(default_factory=dict)
    seen: dict[str, list[object]] = field(default_factory=dict)

    def note(self, account: str, *what: object) -> None:
        order = self.manager._store.accounts.get(account)
        lru = [page.hash for page in order.unreferenced] if order else []
        self.seen.setdefault(account, []).append((*what, self.manager.room(account), lru))

    def pick(self, account: str, which: int) -> Running | None:
        views = self.running.get(account, [])
        return views[which % len(views)] if views else None

    def open(self, account: str, scope: str, tokens: list[int]) -> None:
        match = self.manager.match(tokens, account=account, scope=scope)
        view = self.manager.open_view(match, len(tokens))
        assert view.length <= match.cached_tokens + PAGE_TOKENS * len(match.snapshot)
        check_rows(self.manager, view, tokens)
        run = Running(account, view, tokens[: view.length])
        self.running.setdefault(account, []).append(run)
        self.note(account, "open", match.cached_tokens, view.length)
        self.feed(run, tokens[view.length :])

    def feed(self, run: Running, tokens: list[int]) -> None:
        """Extend, compute and commit; without room nothing happens."""
        before = run.view.pages().tolist()
        try:
            self.manager.extend(run.view, len(tokens))
        except CapacityError as error:
            assert run.view.pages().tolist() == before
            self.note(run.account, "full", type(error).__name__)
            return
        run.tokens = run.tokens + tokens
        fill(self.manager, run.view, run.tokens, run.view.length)
        self.manager.commit(run.view, run.tokens)
        check_rows(self.manager, run.view, run.tokens)
        self.note(run.account, "fed", run.view.length, run.view.num_pages)

    def fork(self, run: Running) -> None:
        try:
            twin = self.manager.fork(run.view)
        except CapacityError as error:
            self.note(run.account, "no fork", type(error).__name__)
            return
        check_rows(self.manager, twin, run.tokens)
        self.running[run.account].append(Running(run.account, twin, run.tokens))
        self.note(run.account, "forked")

    def pack(self, run: Running, end: int, need: Int32Array) -> None:
        """Pack pages 1 to `end` - 1 into `need` [L, Hkv] tiles; without room nothing happens."""
        view, packing = run.view, self.manager.packing
        view.taint(view.length)
        try:
            stays = _staying(view, need)
            every = stays >= -1
            odd = every & (np.arange(len(stays))[:, None, None] % 2 == 1)
            cuts = [(max(end // 2, 1), odd), (1, every)]
            moving = packing.begin(view, end, stays, cuts)
        except CapacityError as error:
            self.note(run.account, "not packed", type(error).__name__)
        else:
            for begin, wanted in cuts:
                packing.take(moving, wanted)
                packing.let_go(moving, begin)
            view.pack(packing.finish(moving, end))
            self.note(run.account, "packed", len(moving.table))
        check_rows(self.manager, view, run.tokens)

    def release(self, run: Running, known: int) -> None:
        self.manager.release(run.view, run.tokens[:known])
        self.running[run.account].remove(run)
        self.note(run.account, "released")

    def evict(self, account: str, count: int) -> None:
        done = self.manager.evict_pages(account, count) if self.manager.fits(account, 0) else 0
        self.note(account, "evicted", done)

    def end_views(self) -> None:
        """Release every view, keeping all that was computed."""
        for runs in self.running.values():
            for run in tuple(runs):
                self.release(run, len(run.tokens))

    def end(self) -> None:
        """Release and evict everything: nothing may be left."""
        store = self.manager._store
        while store._kept:
            store.unlock(store._kept.pop())
        self.end_views()
        check(self.manager)
        for name in tuple(self.manager._store.accounts):
            self.manager.evict_pages(name, self.manager.pool.num_pages)
        assert not list(self.manager.index.roots())
        assert not self.manager.index.public_pages
        assert self.manager.pool.free_pages == self.manager.pool.num_pages
        assert all(a.used_pages == 0 for a in self.manager._store.accounts.values())
        assert PUBLIC_ACCOUNT in self.manager._store.accounts
