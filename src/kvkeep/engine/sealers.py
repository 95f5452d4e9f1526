"""From options to what seals pages below memory, and to the figures of it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvkeep.engine.options import EngineOptions, KeyOptions
from kvkeep.errors import ConfigError
from kvkeep.sealing import PageSealer
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.keys import KeyClient
from kvkeep.shield.keystore import refuse_inside
from kvkeep.shield.providers.local import make_key_file
from kvkeep.shield.providers.provider import CAVEATS, ProviderSpec, parse_spec

DEFAULT_STORE = "kvkeep-sealing.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sealing:
    """A sealer of frames, and the keys that it asks for."""

    sealer: FrameSealer
    keys: KeyClient


def sealing_of(options: KeyOptions, folders: Iterable[Path] = ()) -> Sealing:
    """Return a sealer whose key process runs; it ends when the sealer is let go of.

    `folders` are those of tiers: the key store must lie in none. Raises `ConfigError` where store
    or provider can't be used.
    """
    store = Path(options.store or DEFAULT_STORE).absolute()
    refuse_inside(store, folders)
    spec = provider_of(options)
    if spec.kind in CAVEATS:
        log.warning("sealing keys come from %s: %s", spec.kind, CAVEATS[spec.kind])
    keys = KeyClient(str(spec), str(store), epoch_s=options.epoch_s)
    keys.start()
    sealer = FrameSealer(keys)
    weakref.finalize(sealer, keys.close)
    return Sealing(sealer, keys)


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
    keys = KeyClient(str(provider_of(options)), str(store.absolute()))
    try:
        keys.start()
        return keys.shred(tenant)
    finally:
        keys.close()


def sealer_of(options: EngineOptions, folders: Iterable[Path] = ()) -> PageSealer:
    """Return what seals pages below memory, as the options ask for it."""
    return sealing_of(options.keys, folders).sealer
