"""The caches of an engine: one for each form in which it stores pages."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Final

from kvkeep.cache.accounts import Forgotten, Retention
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.tiers import NoTiers, TierControl, TierUse
from kvkeep.errors import EngineError
from kvkeep.sealing import PUBLIC_OWNER
from kvkeep.types import EpochDelta, SharingPolicy, View

CLOSE_S: Final = 8.0
"""For what is still to be written below memory at the end."""
ROUNDING: Final = 1e-6
"""Of a page, in sums of shares."""


class Caches:
    """Managers by the name of their pages' codec; they share a policy and have quotas each."""

    def __init__(
        self,
        managers: Mapping[str, CacheManager],
        policy: SharingPolicy,
        tiers: TierControl | None = None,
    ) -> None:
        """`tiers`: what the managers have below memory; None: nothing."""
        self.managers = dict(managers)
        self.tiers: TierControl = tiers or NoTiers()
        self._policy = policy
        self._shares: dict[str, float] = {}

    def of(self, codec: str) -> CacheManager:
        """Return the manager of a codec's pages."""
        found = self.managers.get(codec)
        if found is None:
            raise EngineError(f"no cache holds pages of {codec!r}")
        return found

    def of_view(self, view: View) -> CacheManager:
        """Return the manager that opened a view."""
        return self.of(view.tag.codec)

    @property
    def num_pages(self) -> int:
        """Return the pages of all caches, whatever their size."""
        return sum(m.pool.num_pages for m in self.managers.values())

    @property
    def free_pages(self) -> int:
        """Return the pages that can still be handed out."""
        return sum(m.pool.free_pages for m in self.managers.values())

    @property
    def public_pages(self) -> int:
        """Return the pages that are public now."""
        return sum(m.public_pages for m in self.managers.values())

    def set_shares(self, shares: Mapping[str, float]) -> None:
        """Set each account's part of every cache; the rest is for public pages.

        What rounding leaves over is nobody's: a place for a page or two would break public chains.
        Raises `ConfigError` where the parts exceed it.
        """
        self._shares = dict(shares)
        rest = 1.0 - sum(shares.values())
        for manager in self.managers.values():
            pages = manager.pool.num_pages
            quotas = {name: int(share * pages) for name, share in shares.items()}
            manager.set_quotas(quotas, max(0, int(rest * pages + ROUNDING)))

    def quota(self, share: float) -> int:
        """Return the pages that a share is worth."""
        return sum(int(share * m.pool.num_pages) for m in self.managers.values())

    def used(self, account: str) -> int:
        """Return the pages charged to an account, in use or cached."""
        return sum(m.used(account) for m in self.managers.values())

    def unused(self) -> Counter[str]:
        """Return for each account the pages charged to it that nothing holds."""
        found: Counter[str] = Counter()
        for manager in self.managers.values():
            for account, use in manager.stats().accounts.items():
                found[account] += use.unreferenced_pages
        return found

    def set_retention(self, terms: Mapping[str, Retention]) -> None:
        """Say how long accounts keep pages, and how far down; after their parts are set."""
        for manager in self.managers.values():
            manager.set_retention(terms)
        rest = max(0.0, 1.0 - sum(self._shares.values())) if self._shares else 0.0
        self.tiers.set_shares({**self._shares, **({PUBLIC_OWNER: rest} if rest else {})}, terms)

    def poll(self) -> None:
        """Let the tier run what is due."""
        for manager in self.managers.values():
            manager.poll()

    def pause_s(self, idle_s: float, stalled_s: float) -> float:
        """Return how long a loop with nothing to run may wait: for pages on their way, less."""
        if self.tiers.due():
            return 0.0
        copying = any(m.below is not None and m.below.copying for m in self.managers.values())
        return min(stalled_s, idle_s) if copying else idle_s

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Write to the tiers what nothing uses, for so long at most."""
        end_s = time.monotonic() + wait_s
        for manager in self.managers.values():
            if manager.below is not None:
                manager.below.flush(end_s)
        self.tiers.close(max(0.0, end_s - time.monotonic()))

    def tier_uses(self) -> tuple[TierUse, ...]:
        """Return the figures of every tier."""
        return self.tiers.uses()

    def forget(self, account: str) -> Forgotten:
        """Drop every page of an account and all its policy state."""
        gone = [m.forget(account) for m in self.managers.values()]
        return Forgotten(sum(g.pages for g in gone), sum(g.votes for g in gone))

    def forget_votes(self, account: str) -> int:
        """Drop an account's policy state alone; return how many votes."""
        return self._policy.forget(account)

    def end_epoch(self, now: float) -> EpochDelta:
        """Close the policy's epoch, drop what has had its time and apply the snapshot."""
        return self.apply(self._policy.end_epoch(now), now)

    def apply(self, delta: EpochDelta, now: float) -> EpochDelta:
        """Drop what has had its time and apply a snapshot."""
        for manager in self.managers.values():
            manager.apply(delta, now)
        self.tiers.end_epoch(now)
        return delta
