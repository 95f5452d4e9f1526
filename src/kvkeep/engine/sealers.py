"""From options to what seals pages below memory, and to the figures of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvkeep.engine.options import EngineOptions, KeyOptions, ShieldName
from kvkeep.errors import ConfigError, KeysUnavailable, SealError
from kvkeep.models.checkpoint import open_checkpoint
from kvkeep.sealing import KeyState, PageSealer, TierSealer
from kvkeep.shield import envelope, workers
from kvkeep.shield.attestation import can_attest
from kvkeep.shield.cipher import CPU_INFO, FrameSealer, suite_of
from kvkeep.shield.folder import Body, Unwrap, seal_folder
from kvkeep.shield.keeper import MODEL_SLOTS
from kvkeep.shield.keys import KeyClient, unwrap_model
from kvkeep.shield.keystore import KeyStore, refuse_inside
from kvkeep.shield.plain import PlainSealer
from kvkeep.shield.providers.local import make_key_file
from kvkeep.shield.providers.make import make_provider
from kvkeep.shield.providers.provider import CAVEATS, FORMS, ProviderSpec, parse_spec
from kvkeep.shield.secret import SecretRegion
from kvkeep.shield.transfer import TransferKeys

DEFAULT_STORE = "kvkeep-sealing.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sealing:
    """What seals pages, and how to end it."""

    sealer: TierSealer
    close: Callable[[], None]
    keys: Callable[[], KeyState | None]
    """How the keys stand; None: nothing is sealed."""


@dataclass(frozen=True, slots=True)
class TransferSeal:
    """What seals pages on their way between two workers."""

    name: str
    """Workers that differ in it do not understand each other."""
    sealer: Callable[[bytes], PageSealer]
    """Of a transfer, from its key; raises `SealError` where that is none."""


Seal = Callable[[EngineOptions], TransferSeal]
"""Makes what seals pages on their way; `transfer_seal_of` is the usual one."""


def mode_of(options: EngineOptions) -> ShieldName:
    """Return the mode: the one asked for, else `seal` where there is a tier below memory."""
    return options.shield or ("seal" if options.tiers else "off")


def sealing_of(options: EngineOptions, folders: Iterable[Path] = ()) -> Sealing:
    """Return what seals pages below memory: every mode but `off` does.

    `folders` are those of tiers: the key store must lie in none. Raises `ConfigError` where store
    or provider can't be used.
    """
    if mode_of(options) == "off":
        return Sealing(PlainSealer(), lambda: None, lambda: None)
    keys = key_client(options.keys, folders)
    keys.start()
    return Sealing(FrameSealer(keys), keys.close, lambda: keys.state)


def transfer_seal_of(options: EngineOptions) -> TransferSeal:
    """Return what seals pages on their way: every mode but `off` does, by each transfer's key."""
    if mode_of(options) == "off":
        plain = PlainSealer()
        return TransferSeal("off", lambda _: plain)
    suite = suite_of(CPU_INFO)
    return TransferSeal("seal", lambda key: FrameSealer(TransferKeys(key), suite))


def key_client(options: KeyOptions, folders: Iterable[Path] = ()) -> KeyClient:
    """Return the server's side of a key process that is still to be started."""
    store = store_path(options)
    refuse_inside(store, folders)
    if options.given is not None:
        if not store.exists():
            raise ConfigError(
                f"shield_store: there is no {store} on this node; all nodes of a cluster must share"
                f" the folder {store.parent}, and need nothing beside it"
            )
        return KeyClient("", str(store), epoch_s=options.epoch_s, given=options.given.pages)
    spec = provider_of(options)
    if spec.kind in CAVEATS:
        log.warning("sealing keys come from %s: %s", spec.kind, CAVEATS[spec.kind])
    return KeyClient(str(spec), str(store), epoch_s=options.epoch_s)


def provider_of(options: KeyOptions) -> ProviderSpec:
    """Return the provider: the one that is named, or a key file beside the store.

    Makes that file where neither it nor the store is there yet; of several that start at a time,
    one does.
    """
    path, store = _own_key_file(options), store_path(options)
    if options.provider is None and not store.exists():
        with KeyStore(store).locked():
            if not (path.exists() or store.exists()):
                make_key_file(path)
    return _named_or_own(options)


def _named_or_own(options: KeyOptions) -> ProviderSpec:
    if options.provider is not None:
        return parse_spec(options.provider)
    return ProviderSpec("file", (str(_own_key_file(options)),))


def store_path(options: KeyOptions) -> Path:
    """Return the file of wrapped keys."""
    return Path(options.store or DEFAULT_STORE).absolute()


def _own_key_file(options: KeyOptions) -> Path:
    """Return the key file that is used where no provider is named."""
    store = store_path(options)
    return store.with_name(f"{store.name}.kek")


def attested_spec(options: KeyOptions) -> ProviderSpec:
    """Return who releases keys against attestation; raises `ConfigError` where nobody does."""
    spec = parse_spec(options.provider) if options.provider else None
    if spec is None or spec.kind != "attested":
        raise ConfigError(
            "shield: tee needs keys that an attested machine alone is given;"
            f" set shield_keys to {FORMS['attested']}"
        )
    return spec


def attested_worker(options: KeyOptions, worker: str) -> KeyOptions:
    """Return by what a worker seals that attests itself: a store and a key of its own."""
    url, key, *entry = attested_spec(options).parts
    own = ProviderSpec("attested", (url, workers.released_to(worker, key), *entry))
    store = workers.store_of(store_path(options), worker)
    return msgspec.structs.replace(
        options, provider=str(own), store=str(store), model_provider=options.provider
    )


def require_attested(options: KeyOptions) -> None:
    """Raise `ConfigError` where keys are not released against attestation, or it can't be had."""
    spec = attested_spec(options)
    if not can_attest(spec.parts[2] if len(spec.parts) > 2 else None):
        raise ConfigError(
            "shield: tee: this machine gives no attestation reports; use seal, or see"
            " `kvkeep doctor`"
        )


def key_state(options: KeyOptions) -> str:
    """Return whether keys could be had now; starts a key process where there is a store."""
    store = store_path(options)
    if not store.exists():
        return f"no {store} yet; the first start with a tier makes it"
    keys = key_client(options)
    try:
        status = keys.start()
    except ConfigError as error:
        return f"NONE: {error}"
    finally:
        keys.close()
    return f"of {status.owners} owners, wrapped by {status.provider}, in {status.key_memory} memory"


def unwrap_of(options: KeyOptions) -> Unwrap:
    """Return what asks a key process for a sealed checkpoint's key."""

    def unwrap(body: Body) -> memoryview:
        if options.given is not None and options.given.model:
            return memoryview(bytearray(options.given.model))
        if options.provider is None and not _own_key_file(options).exists():
            raise ConfigError(
                f"shield_keys: the model is sealed by a key of {body.provider}; name its provider"
            )
        named = options.model_provider
        spec = _named_or_own(options) if named is None else parse_spec(named)
        try:
            return unwrap_model(str(spec), body.model_id, body.wrapped)
        except KeysUnavailable as error:
            raise ConfigError(
                f"shield_keys: {spec.kind} can't be used now: {error}; see that it answers"
            ) from None
        except SealError:
            raise ConfigError(
                f"shield_keys: {spec.kind} does not open the model's key; name the provider"
                f" ({body.provider}) and key that sealed it"
            ) from None

    return unwrap


def seal_model(options: KeyOptions, source: Path, target: Path) -> Body:
    """Write a checkpoint to a new folder with its weights sealed; raises `ConfigError`.

    The provider's key comes to this process, which should forbid dumps of itself first.
    """
    names = [file.name for file in open_checkpoint(source).files]
    spec = provider_of(options)
    region = SecretRegion(MODEL_SLOTS)
    try:
        provider = make_provider(spec, region)

        def wrap(key: memoryview, model_id: str) -> bytes:
            return provider.wrap(key, envelope.model_label(model_id))

        return seal_folder(source, target, names, wrap, spec.kind)
    except KeysUnavailable as error:
        raise ConfigError(f"shield_keys: {spec.kind} can't be used now: {error}") from None
    except OSError as error:
        raise ConfigError(f"out: can't write {target}: {error.strerror}; name a new one") from None
    finally:
        region.close()


def shred_in(options: KeyOptions, tenant: str) -> bytes:
    """Destroy a tenant's keys by a key process of its own; returns the receipt.

    Raises `ConfigError` where there is no store, or none of this tenant's keys in it.
    """
    store = store_path(options)
    if not (store.exists() or workers.stores_of(store)):
        raise ConfigError(f"shield_store: there is no {store}; no page was ever sealed with it")
    keys = key_client(options)
    try:
        keys.start()
        return keys.shred(tenant)
    finally:
        keys.close()
