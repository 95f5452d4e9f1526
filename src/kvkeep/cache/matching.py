"""What the cache holds of a prompt, for one scope."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile

from kvkeep.cache.below import Below
from kvkeep.cache.radix import Page, RadixIndex, TokenIds
from kvkeep.cache.store import PUBLIC_ACCOUNT
from kvkeep.errors import ConfigError
from kvkeep.sealing import SealContext
from kvkeep.types import (
    PAGE_TOKENS,
    PUBLIC_SCOPE,
    Access,
    PageSpec,
    PageTag,
    SharingPolicy,
    chain_hash,
)


def public_start(index: RadixIndex, policy: SharingPolicy, scope: str) -> bytes:
    """Return what a request's public pages continue: the model, or its scope's part of it."""
    if not policy.by_scope:
        return index.model_digest
    return chain_hash(index.model_digest, b"scope", scope.encode())


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache holds of a prompt for one scope; nothing is locked until it is opened."""

    account: str
    tag: PageTag
    public: tuple[Page, ...]
    """Pages that are public in the open."""
    own: tuple[Page, ...]
    """Pages of the scope that continue the public ones."""
    partial: tuple[Page, int] | None
    """A page of the scope that shares this many rows with the prompt's next page."""
    pending: tuple[SealContext, ...]
    """What the next pages are bound to, which a tier holds."""
    cached_tokens: int
    """What `public`, `own` and `partial` hold: the same whatever others have sent."""
    snapshot: tuple[Page, ...] = ()
    """Pages of the epoch's snapshot that continue `own`; the view gets copies of its own."""
    node: bytes = b""
    """The last page of the prompt that others made public, among them or among `own`."""
    branch: bytes = b""
    """Stands for the tokens of the page after it."""

    def attached(self) -> list[Page]:
        """Return the matched pages up to the first that has left the index since."""
        return list(takewhile(lambda page: page.attached, self.public + self.own))

    def access(
        self, at: int, prompt_len: int, served: tuple[bytes, ...], answer_tokens: int | None
    ) -> Access:
        """Return what a policy hears of a prompt that was `served` these public pages."""
        own = max(min(self.cached_tokens, prompt_len) - len(self.public) * PAGE_TOKENS, 0)
        return Access(
            self.account, at, prompt_len, own, served, self.branch, answer_tokens, self.node
        )


class Matcher:
    """Reads the index; changes nothing."""

    def __init__(
        self,
        index: RadixIndex,
        policy: SharingPolicy,
        tag_of: Callable[[str], PageTag],
        below: Below | None,
        spec: PageSpec,
    ) -> None:
        """What is found is cut to whole blocks of the spec's pages."""
        self._index = index
        self._policy = policy
        self._tag_of = tag_of
        self._below = below
        self._copies_rows = spec.window_tokens is None and index.keys.rows
        self._key_bytes = index.keys.page_bytes
        self._block_pages = spec.block_pages
        self._public_tag = tag_of(PUBLIC_SCOPE)

    def match(self, tokens: TokenIds, *, account: str, scope: str) -> Match:
        """Return the longest cached start of a prompt: public pages, own pages, an own page's rows.

        Of equally long ones, the one with the most public pages. What the snapshot adds comes
        after, and is used like pages yet to be computed: no result but the time depends on it.
        """
        tag = self._private_tag(scope)
        raw = self._index.keys.of(tokens)
        readable = self._match_public(raw, account, scope)
        public = self._whole(tuple(takewhile(lambda page: page.pinned, readable)))
        best = Match(account, tag, public, (), None, (), len(public) * PAGE_TOKENS)
        for shared in range(len(public), -1, -1):
            start = public[shared - 1].hash if shared else self._index.model_digest
            root = self._index.find_root(start, account, tag)
            if root is None:
                continue
            own = self._index.walk(root, raw, shared)
            pages = self._in_blocks(shared + len(own))
            own = own[: max(pages - shared, 0)]
            rest = self._key_of(raw, pages)
            partial = None
            if rest and self._copies_rows:
                partial = self._index.longest_partial(own[-1] if own else root, rest)
            cached = pages * PAGE_TOKENS + (partial[1] if partial else 0)
            if cached > best.cached_tokens:
                best = Match(account, tag, public[:shared], tuple(own), partial, (), cached)
        best = self._with_snapshot(best, readable, raw)
        return best if self._below is None else self._with_pending(best, raw, self._below)

    def _private_tag(self, scope: str) -> PageTag:
        tag = self._tag_of(scope)
        if scope == PUBLIC_SCOPE or tag.scope != scope:
            raise ConfigError(
                "scope: a request needs a scope of its own; derive it from its tenant"
            )
        return tag

    def _match_public(self, raw: bytes, account: str, scope: str) -> tuple[Page, ...]:
        start = public_start(self._index, self._policy, scope)
        root = self._index.find_root(start, PUBLIC_ACCOUNT, self._public_tag)
        if root is None:
            return ()
        pages = self._index.walk(root, raw)
        if not pages:
            return ()
        allowed = self._policy.public_len(tuple(page.hash for page in pages), account)
        return self._whole(tuple(pages[: max(allowed, 0)]))

    def _whole(self, pages: tuple[Page, ...]) -> tuple[Page, ...]:
        """Return a prompt's first pages without those of a block that is not all there."""
        return pages[: self._in_blocks(len(pages))]

    def _key_of(self, raw: bytes, page: int) -> bytes:
        return raw[page * self._key_bytes : (page + 1) * self._key_bytes]

    def _in_blocks(self, pages: int) -> int:
        return pages - pages % self._block_pages

    def _with_snapshot(self, match: Match, readable: tuple[Page, ...], raw: bytes) -> Match:
        """Add the readable pages that go on where the match ends."""
        known, pages = len(match.public) + len(match.own), len(readable)
        rest = self._key_of(raw, pages)
        branch = hashlib.blake2b(rest, digest_size=8, person=b"kvkeep-branch").digest()
        node = readable[-1].hash if readable and not readable[-1].pinned else b""
        return replace(match, snapshot=readable[known:], node=node, branch=branch)

    def _with_pending(self, match: Match, raw: bytes, below: Below) -> Match:
        """Add the next pages that the tier holds."""
        pages = match.public + match.own
        last = pages[-1].hash if pages else self._index.model_digest
        digest = match.tag.digest()
        pending: list[SealContext] = []
        for page in range(len(pages), len(raw) // self._key_bytes):
            last = chain_hash(last, digest, self._key_of(raw, page))
            found = below.find(match.account, match.tag, last, page)
            if found is None:
                break
            pending.append(found)
        whole = self._in_blocks(len(pages) + len(pending)) - len(pages)
        return replace(match, pending=tuple(pending[: max(whole, 0)]))
