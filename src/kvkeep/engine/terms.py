"""From settings and tenants' terms to members and to the rule that counts their votes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kvkeep.engine.api import TenantTerms
from kvkeep.engine.options import SharingOptions
from kvkeep.errors import ConfigError
from kvkeep.sharing.members import Member
from kvkeep.sharing.policies.dp import Noisy
from kvkeep.sharing.policies.selective import AtLeast
from kvkeep.sharing.rules import Rule
from kvkeep.sharing.state import FileStore, NoStore, StateStore
from kvkeep.sharing.votes import PromotionLimits

VOTING: Final = ("selective", "dp")
"""Policies that publish at epochs' ends what enough have voted for."""
_KEY_BYTES: Final = 32


def members_of(terms: Mapping[str, TenantTerms]) -> dict[str, Member]:
    """Return the accounts that share with anybody."""
    return {
        account: Member(term.voter, term.group, term.contribute, term.consume)
        for account, term in terms.items()
        if term.group is not None
    }


def leaving(old: Mapping[str, Member], new: Mapping[str, Member]) -> list[str]:
    """Return the accounts whose votes must not count where members are others."""
    return [
        account
        for account, was in old.items()
        if (now := new.get(account)) is None
        or (now.voter, now.group) != (was.voter, was.group)
        or (was.contribute and not now.contribute)
    ]


def limits_of(options: SharingOptions) -> PromotionLimits:
    """Return how promotion is paced; raises `ConfigError`."""
    return PromotionLimits(epoch_s=options.epoch_s, units_per_day=options.units_per_day)


def store_of(options: SharingOptions) -> StateStore:
    """Return where votes are kept over restarts."""
    return FileStore(Path(options.state)) if options.state else NoStore()


def rule_of(options: SharingOptions) -> Rule:
    """Return the rule of a policy that counts votes; raises `ConfigError` for another one."""
    match options.policy:
        case "selective":
            return AtLeast(options.k, options.life_epochs)
        case "dp":
            key = _draw_key(options.state)
            return Noisy(key, options.eps, options.delta, options.life_epochs)
    raise ConfigError(f"share: {options.policy!r} counts no votes; share 'selective' or 'dp'")


def _draw_key(state: str | None) -> bytes:
    """Return the key of all draws, kept beside the state: a restart draws the same."""
    if state is None:
        return secrets.token_bytes(_KEY_BYTES)
    store = FileStore(Path(state + ".key"))
    key = store.load()
    if key is None or len(key) != _KEY_BYTES:
        key = secrets.token_bytes(_KEY_BYTES)
        store.save(key)
    return key
