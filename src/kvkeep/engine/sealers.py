"""From options to what seals pages below memory, and to the figures of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kvkeep.engine.options import EngineOptions, KeyOptions, ShieldName
from kvkeep.errors import ConfigError
from kvkeep.sealing import PageSealer
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.keys import KeyClient
from kvkeep.shield.keystore import refuse_inside
from kvkeep.shield.plain import PlainSealer
from kvkeep.shield.providers.local import make_key_file
from kvkeep.shield.providers.provider import CAVEATS, ProviderSpec, parse_spec

DEFAULT_STORE = "kvkeep-sealing.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sealing:
    """What seals pages, and how to end it."""

    sealer: PageSealer
    close: Callable[[], None]


def mode_of(options: EngineOptions) -> ShieldName:
    """Return the mode: the one asked for, else `seal` where there is a tier below memory."""
    return options.shield or ("seal" if options.tiers else "off")


def sealing_of(options: EngineOptions, folders: Iterable[Path] = ()) -> Sealing:
    """Return what seals pages below memory: every mode but `off` does.

    `folders` are those of tiers: the key store must lie in none. Raises `ConfigError` where store
    or provider can't be used.
    """
    if mode_of(options) == "off":
        return Sealing(PlainSealer(), lambda: None)
    keys = key_client(options.keys, folders)
    keys.start()
    return Sealing(FrameSealer(keys), keys.close)


def key_client(options: KeyOptions, folders: Iterable[Path] = ()) -> KeyClient:
    """Return the server's side of a key process that is still to be started."""
    store = Path(options.store or DEFAULT_STORE).absolute()
    refuse_inside(store, folders)
    spec = provider_of(options)
    if spec.kind in CAVEATS:
        log.warning("sealing keys come from %s: %s", spec.kind, CAVEATS[spec.kind])
    return KeyClient(str(spec), str(store), epoch_s=options.epoch_s)


def provider_of(options: KeyOptions) -> ProviderSpec:
    """Return the provider: the one that is named, or a key file beside the store.

    Makes that file where neither it nor the store is there yet.
    """
    if options.provider is not None:
        return parse_spec(options.provider)
    store = Path(options.store or DEFAULT_STORE).absolute()
    path = store.with_name(f"{store.name}.kek")
    if not path.exists() and not store.exists():
        make_key_file(path)
    return ProviderSpec("file", (str(path),))


def shred_in(options: KeyOptions, tenant: str) -> bytes:
    """Destroy a tenant's keys by a key process of its own; returns the receipt.

    Raises `ConfigError` where there is no store, or none of this tenant's keys in it.
    """
    store = Path(options.store or DEFAULT_STORE)
    if not store.exists():
        raise ConfigError(f"shield_store: there is no {store}; no page was ever sealed with it")
    keys = key_client(options)
    try:
        keys.start()
        return keys.shred(tenant)
    finally:
        keys.close()
