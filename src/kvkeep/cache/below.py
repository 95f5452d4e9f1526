"""The tier below one cache: names its pages, and copies them there when there is time.

A page is announced as soon as nothing uses it: then, in the order of its owner's own doings, the
tier makes room for it. Its bytes follow a few at a time, or at once where the page is evicted
first. So what a tier holds of an owner does not depend on how fast the copying was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial

from kvkeep.cache.accounts import Retention
from kvkeep.cache.pace import Pace
from kvkeep.cache.parts import Pages
from kvkeep.cache.radix import Page, RadixIndex
from kvkeep.cache.tiers import Copy, Install, Tier
from kvkeep.sealing import PUBLIC_OWNER, SealContext
from kvkeep.types import PageKind, PageSpec, PageTag

COPY_BYTES = 512 << 10
"""Copied to a tier in a short step beside what is evicted; at least one page."""
MOST_BYTES = 16 << 20
"""In a long one."""
MOST_S = 0.0015
"""No one waits for a copy down, so that even a long step gives it no more."""

CHAIN_BYTES = 32
"""Of a page's chain hash."""

_FLUSH_S = 0.001
_DIGEST_BYTES = 16


def form_digest(spec: PageSpec, order: bytes) -> bytes:
    """Return 16 bytes that stand for how pages' bytes are arranged; `order`: beside the spec."""
    fields = (
        int(spec.layout),
        spec.num_layers,
        spec.num_kv_heads,
        spec.head_dim,
        spec.tile_bytes,
        spec.window_tokens,
        spec.first_extra_bytes,
        tuple((int(form.layout), form.tile_bytes) for row in spec.forms for form in row),
    )
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"kvkeep-form")
    for part in (repr(fields).encode(), order):
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


def layer_bytes(pool: Pages, kind: PageKind) -> tuple[int, ...]:
    """Return the bytes of each layer of a page of a pool."""
    extra = pool.spec.num_kv_heads * pool.spec.first_extra_bytes
    added = extra if kind is PageKind.FIRST else 0
    return tuple(int(size) + added for size in pool.spec.tile_sizes().sum(1))


class Below:
    """A tier as one cache uses it."""

    def __init__(
        self,
        tier: Tier,
        pool: Pages,
        index: RadixIndex,
        order: bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`order` decides the bytes of a page beside its spec: kernels, device, dtype."""
        self._tier = tier
        self._pool = pool
        self._model_digest = index.model_digest
        self.form = form_digest(pool.spec, order)
        """Of how its pages' bytes are arranged."""
        self._clock = clock
        self.meta_bytes = CHAIN_BYTES + index.keys.page_bytes
        """Before a public page's layers: its parent's chain hash and its key in the index."""
        self._plain = layer_bytes(pool, PageKind.PLAIN)
        self._first = layer_bytes(pool, PageKind.FIRST)
        self._due: dict[str, dict[Page, Copy]] = {}
        self._pace = Pace(COPY_BYTES, MOST_BYTES, most_s=MOST_S)

    def context(self, owner: str, tag: PageTag, chain: bytes, kind: PageKind) -> SealContext:
        """Return what a page of this cache is bound to."""
        return SealContext(owner, tag, chain, self._model_digest, self.form, kind)

    def find(self, owner: str, tag: PageTag, chain: bytes, index: int) -> SealContext | None:
        """Return what a page is bound to; None where the tier does not hold it.

        `index` is its place in its sequence.
        """
        first = index == 0 and self._pool.num_first > 0
        context = self.context(owner, tag, chain, PageKind.FIRST if first else PageKind.PLAIN)
        return context if self._tier.holds(context) else None

    def fetch(self, context: SealContext, install: Install, done: Callable[[bool], None]) -> None:
        """Start to fetch a page, see `Tier.fetch`."""
        self._tier.fetch(context, self._sizes(context.kind), install, done)

    def rest(self, page: Page, terms: Retention) -> None:
        """Announce a full page that nothing uses any more."""
        if not terms.to_tier:
            return
        context = self.context(page.account, page.tag, page.hash, page.kind)
        expires_s = None if terms.ttl_s is None else self._clock() + terms.ttl_s
        read = partial(self._pool.read_page, page.slot)
        copy = self._tier.store(context, self._sizes(page.kind), read, expires_s)
        if copy is not None:
            self._due.setdefault(page.account, {})[page] = copy

    def publish(self, page: Page) -> None:
        """Announce a page that is public now, under the public pages' own keys."""
        above = b"" if page.parent is None else page.parent.hash
        context = self.context(PUBLIC_OWNER, page.tag, page.hash, page.kind)
        read = partial(self._read_public, page.slot, above + page.key)
        copy = self._tier.store(context, self._public_sizes(page.kind), read, None)
        if copy is not None:
            self._due.setdefault(page.account, {})[page] = copy

    def find_public(self, tag: PageTag, chain: bytes) -> SealContext | None:
        """Return what a public page is bound to; None where the tier does not hold it."""
        kinds = (PageKind.PLAIN, PageKind.FIRST) if self._pool.num_first else (PageKind.PLAIN,)
        contexts = (self.context(PUBLIC_OWNER, tag, chain, kind) for kind in kinds)
        return next((one for one in contexts if self._tier.holds(one)), None)

    def fetch_public(
        self, context: SealContext, install: Install, done: Callable[[bool], None]
    ) -> None:
        """Start to fetch a public page: `meta_bytes` come as layer 0, its layers after that."""
        self._tier.fetch(context, self._public_sizes(context.kind), install, done)

    def evicted(self, page: Page) -> None:
        """Copy a page that leaves memory, if that is still to be done."""
        copy = self._pop(page)
        if copy is not None:
            copy.take(last=True)

    def dropped(self, page: Page) -> None:
        """Copy nothing of a page that is no longer in the index."""
        copy = self._pop(page)
        if copy is not None:
            copy.cancel()

    def forget(self, owner: str) -> int:
        """Drop every page of an owner below; return how many."""
        for copy in self._due.pop(owner, {}).values():
            copy.cancel()
        return self._tier.forget(owner)

    @property
    def copying(self) -> bool:
        """Tell whether pages are still to be copied."""
        return bool(self._due)

    def poll(self) -> None:
        """Copy a little, each owner in turn, and let the tier run what is due."""
        budget = self._pace.budget()
        self._copy(budget.most_bytes, partial(self._pace.over, budget))
        self._tier.poll()

    def flush(self, end_s: float) -> None:
        """Copy everything, until a time of `time.monotonic`."""
        while self._due and time.monotonic() < end_s:
            if not self._copy(COPY_BYTES, lambda: False):
                time.sleep(_FLUSH_S)
            self._tier.poll()

    def _copy(self, budget_bytes: int, over: Callable[[], bool]) -> int:
        """Return how many bytes were copied: up to a budget, or its time's end, but whole pages."""
        copied = 0
        for owner in list(self._due):
            for page, copy in list(self._due[owner].items()):
                if copied >= budget_bytes or (copied and over()):
                    self._due[owner] = self._due.pop(owner)  # the others come first next time
                    return copied
                if not copy.take(last=False):
                    break
                self._pop(page)
                copied += sum(self._sizes(page.kind))
        return copied

    def _pop(self, page: Page) -> Copy | None:
        own = self._due.get(page.account)
        copy = None if own is None else own.pop(page, None)
        if own is not None and not own:
            del self._due[page.account]
        return copy

    def _read_public(self, slot: int, meta: bytes, into: memoryview) -> None:
        into[: self.meta_bytes] = meta
        self._pool.read_page(slot, into[self.meta_bytes :])

    def _public_sizes(self, kind: PageKind) -> tuple[int, ...]:
        return (self.meta_bytes, *self._sizes(kind))

    def _sizes(self, kind: PageKind) -> tuple[int, ...]:
        return self._first if kind is PageKind.FIRST else self._plain
