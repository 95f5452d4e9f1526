"""The one index of pages: a tree per start of chain, account and tag.

A node is a page of S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol, overload

import numpy as np

from kvkeep.types import (
    PAGE_TOKENS,
    PUBLIC_SCOPE,
    Chain,
    Int32Array,
    PageKind,
    PageState,
    PageTag,
    chain_hash,
)

KEY_BYTES = PAGE_TOKENS * 4
"""A full page's key: its int32 token ids as bytes."""

_SCAN_LIMIT = 256
"""Children looked at for a common start of rows; the newest first."""

TokenIds = Int32Array | Sequence[int]


def token_bytes(tokens: TokenIds) -> bytes:
    """Return token ids as int32, little-endian: what keys and chain hashes are made of."""
    return np.asarray(tokens, dtype="<i4").tobytes()


class PageKeys(Protocol):
    """What stands for the tokens of pages in the index: the tokens, or labels that hide them."""

    page_bytes: int
    """A full page's key; a longer one is no key."""
    rows: bool
    """Whether a key says how many leading rows two pages share."""

    def of(self, tokens: TokenIds, before: bytes = b"") -> bytes:
        """Return the keys of pages, one after the other, the last perhaps of a page's first rows.

        `before`: the key of the page that they follow.
        """


class TokenKeys:
    """Keys are token ids, compared in full: no collision can give a prompt another's page."""

    page_bytes = KEY_BYTES
    rows = True

    def of(self, tokens: TokenIds, before: bytes = b"") -> bytes:
        """Return the tokens' own bytes."""
        return token_bytes(tokens)


TOKEN_KEYS = TokenKeys()


class Page:
    """One page and its node in the tree; also a tree's root, which has no slot.

    `attached` says that the index can find it. A page not attached is freed when its last view lets
    go of it.
    """

    __slots__ = (
        "account",
        "attached",
        "children",
        "hash",
        "index",
        "key",
        "kind",
        "n_tokens",
        "parent",
        "partials",
        "pinned",
        "ref_count",
        "since_s",
        "slot",
        "state",
        "tag",
        "tag_digest",
    )

    def __init__(
        self, slot: int, account: str, tag: PageTag, kind: PageKind = PageKind.PLAIN
    ) -> None:
        self.slot = slot
        self.kind = kind
        self.account = account
        self.tag = tag
        self.tag_digest = b""
        self.key = b""
        self.hash = b""
        self.index = -1
        """Position in pages; a root's is that of the page before its first."""
        self.n_tokens = 0
        """Rows the index vouches for: S, or fewer in a partial leaf."""
        self.parent: Page | None = None
        self.children: dict[bytes, Page] = {}
        self.partials: dict[bytes, Page] = {}
        self.ref_count = 0
        self.state = PageState.OPEN
        self.attached = False
        self.since_s = 0.0
        """Time of the epoch's end that made it public, in seconds."""
        self.pinned = False
        """Public in the open: a hit counts as one, and no reader's share pays for it."""


class PublicChain(Chain):
    """The chain hashes of full pages under the public tag, computed only when looked at.

    Reads `tokens` when asked, so it is valid during the call it is passed to.
    """

    def __init__(
        self,
        root: bytes,
        tag_digest: bytes,
        tokens: TokenIds,
        num_pages: int,
        keys: PageKeys = TOKEN_KEYS,
    ) -> None:
        self._root = root
        self._tag_digest = tag_digest
        self._tokens = tokens
        self._num_pages = num_pages
        self._keys = keys
        self._last_key = b""
        self._known: list[bytes] = []

    def __len__(self) -> int:
        return self._num_pages

    def token_ids(self) -> Int32Array:
        """Return the tokens of all its pages."""
        return np.asarray(self._tokens[: self._num_pages * PAGE_TOKENS], np.int32)

    @overload
    def __getitem__(self, key: int) -> bytes: ...

    @overload
    def __getitem__(self, key: slice) -> Sequence[bytes]: ...

    def __getitem__(self, key: int | slice) -> bytes | Sequence[bytes]:
        wanted = range(self._num_pages)[key]
        upto = wanted if isinstance(wanted, int) else max(wanted, default=-1)
        known = self._known
        while len(known) <= upto:
            first = len(known) * PAGE_TOKENS
            page = self._keys.of(self._tokens[first : first + PAGE_TOKENS], self._last_key)
            known.append(chain_hash(known[-1] if known else self._root, self._tag_digest, page))
            self._last_key = page
        if isinstance(wanted, int):
            return known[wanted]
        return tuple(known[i] for i in wanted)


class RadixIndex:
    """All trees of one model.

    A tree is found by the chain hash it continues (the model digest, or a public page's hash), the
    account that pays and the tag, so no walk can reach a page of another account, scope, codec or
    shield. A page's key in its parent is its tokens, so a hit is a comparison of all tokens, never
    of a hash alone; but where `keys` are labels that hide them.
    """

    def __init__(self, model_digest: bytes, keys: PageKeys = TOKEN_KEYS) -> None:
        self.model_digest = model_digest
        self.keys = keys
        self._roots: dict[tuple[bytes, str, PageTag], Page] = {}
        self.public_pages: dict[bytes, Page] = {}
        """Public full pages by chain hash."""

    def find_root(self, start: bytes, account: str, tag: PageTag) -> Page | None:
        """Return a tree's root where it holds any page."""
        return self._roots.get((start, account, tag))

    def root(self, start: bytes, account: str, tag: PageTag, index: int = -1) -> Page:
        """Return a tree's root, made where it is missing.

        `index` is the position of the page it continues.
        """
        key = (start, account, tag)
        found = self._roots.get(key)
        if found is None:
            found = Page(-1, account, tag)
            found.hash, found.tag_digest, found.index = start, tag.digest(), index
            found.attached = True
            self._roots[key] = found
        return found

    def roots(self) -> Iterator[Page]:
        """Yield every tree's root; the trees may be changed meanwhile."""
        yield from tuple(self._roots.values())

    def walk(self, root: Page, raw: bytes, first_page: int = 0) -> list[Page]:
        """Return the pages equal to whole pages of `raw` (keys), from `first_page` on."""
        pages: list[Page] = []
        children, size = root.children, self.keys.page_bytes
        for begin in range(first_page * size, len(raw) - size + 1, size):
            page = children.get(raw[begin : begin + size])
            if page is None:
                break
            pages.append(page)
            children = page.children
        return pages

    def longest_partial(self, node: Page, rest: bytes) -> tuple[Page, int] | None:
        """Return the page after `node` that begins most like `rest`, and its number of equal rows.

        Looks at a bounded number of children, the newest first; None where keys hide rows.
        """
        if not self.keys.rows:
            return None
        best: Page | None = None
        rows = 0
        for group in (node.partials, node.children):
            for key, page in islice(reversed(group.items()), _SCAN_LIMIT):
                need = 4 * (rows + 1)
                if need <= len(rest) and key[:need] == rest[:need] and len(key) >= need:
                    best, rows = page, _common_rows(key, rest, rows + 1)
        return None if best is None else (best, rows)

    def attach(self, parent: Page, page: Page, key: bytes) -> None:
        """Make a page findable below `parent`.

        A key shorter than a full page makes it a partial leaf.

        The key must not be there yet, and the page must be charged to the tree's account.
        """
        if parent.parent is None and self._roots.get(_root_key(parent)) is not parent:
            raise RuntimeError("the tree was dropped; ask for its root again")
        page.key, page.parent, page.index = key, parent, parent.index + 1
        page.tag, page.tag_digest = parent.tag, parent.tag_digest
        page.hash = chain_hash(parent.hash, parent.tag_digest, key)
        whole = len(key) == self.keys.page_bytes
        page.n_tokens = PAGE_TOKENS if whole else len(key) // 4
        page.attached = True
        if not whole:
            parent.partials[key] = page
            return
        parent.children[key] = page
        if page.tag.scope == PUBLIC_SCOPE:
            self.public_pages[page.hash] = page

    def detach(self, page: Page) -> None:
        """Take a page without children or partial leaves out of the index.

        An empty tree goes with its last page.
        """
        parent = page.parent
        if parent is None or page.children or page.partials:
            raise RuntimeError("only a leaf can leave the index")
        group = parent.partials if page.n_tokens < PAGE_TOKENS else parent.children
        del group[page.key]
        if self.public_pages.get(page.hash) is page:
            del self.public_pages[page.hash]
        page.attached, page.parent = False, None
        if parent.parent is None and not parent.children and not parent.partials:
            self._roots.pop(_root_key(parent), None)

    def leaves_first(self, top: Page) -> list[Page]:
        """Return all pages below `top`, every page before its parent."""
        found: list[Page] = []
        stack = [top]
        while stack:
            node = stack.pop()
            for child in (*node.children.values(), *node.partials.values()):
                found.append(child)
                stack.append(child)
        return found[::-1]


def path_to(page: Page) -> list[Page]:
    """Return a page and those before it in its tree, the first page first."""
    path = [page]
    while path[-1].parent is not None and path[-1].parent.parent is not None:
        path.append(path[-1].parent)
    return path[::-1]


def _root_key(root: Page) -> tuple[bytes, str, PageTag]:
    return root.hash, root.account, root.tag


def _common_rows(key: bytes, rest: bytes, at_least: int) -> int:
    """Return how many leading tokens of two byte strings are equal, by bisection."""
    low, high = at_least, min(len(key), len(rest)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        if key[4 * low : 4 * middle] == rest[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle - 1
    return low
