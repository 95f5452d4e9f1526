"""`kvkeep keys`: the keys that seal pages below memory; running servers see each change at once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from kvkeep.cli.console import NOTES, OUT, make_table
from kvkeep.cli.options import new_app, with_settings
from kvkeep.config import Settings
from kvkeep.errors import ConfigError

app = new_app("Make, rotate and look at the keys that seal pages below memory.")

Owner = Annotated[str, typer.Argument(help="tenant, TENANT/CHILD of a gateway, or *public")]


@app.command()
def init(
    provider: Annotated[str, typer.Argument(help="file:PATH, the key file to make")],
) -> None:
    """Make a key file that wraps all other keys; other providers keep theirs themselves."""
    from kvkeep.shield.providers.local import make_key_file
    from kvkeep.shield.providers.provider import CAVEATS, parse_spec

    spec = parse_spec(provider)
    if spec.kind != "file":
        raise ConfigError(f"provider: a key of {spec.kind} is made where it lives; name file:PATH")
    make_key_file(Path(spec.parts[0]))
    NOTES.print(f"Made {spec.parts[0]}. Note: {CAVEATS['file']}.")


@app.command()
@with_settings("keys", "shield_store")
def status(settings: Settings) -> None:
    """List whose keys there are, since when, and their epochs; asks no provider."""
    from kvkeep.cli.engine import key_store
    from kvkeep.shield.keystore import KeyStore

    file = KeyStore(key_store(settings)).read()
    rows = [
        (owner, len(keys.epochs), _day(keys.created), _day(max(e.created for e in keys.epochs)))
        for owner, keys in sorted(file.owners.items())
    ]
    gone = [(s.owner, 0, "", f"destroyed {_day(s.at)}") for s in file.shredded]
    OUT.print(make_table(("owner", "epochs", "since", "newest epoch"), [*rows, *gone]))
    public = "none yet" if file.own is None else file.own.public.hex()
    OUT.print(f"provider: {file.provider or 'none yet'}; receipts are signed by {public}")


@app.command()
@with_settings("keys", "shield_store", "shield_keys")
def retire(
    settings: Settings,
    owner: Owner,
    before: Annotated[int, typer.Argument(help="the first epoch to keep", min=1)],
) -> None:
    """Destroy an owner's keys of former epochs; pages still sealed under them open nowhere."""
    from kvkeep.cli.engine import opened_store

    with opened_store(settings) as store:
        count = store.retire(owner, before)
    NOTES.print(f"Destroyed {count} keys of {owner}; its pages under them are misses from now on.")


@app.command()
@with_settings("keys", "shield_store", "shield_keys", "tier")
def rotate(
    settings: Settings,
    owner: Owner,
    *,
    root: Annotated[bool, typer.Option("--root", help="renew the owner's root instead")] = False,
) -> None:
    """Seal an owner's pages under a new key from now on; the old ones still open."""
    from kvkeep.cli.engine import opened_store

    with opened_store(settings) as store:
        if root:
            store.renew_root(owner)
            NOTES.print(f"{owner} has a new root; its pages stay as they are.")
        else:
            NOTES.print(f"{owner} is in epoch {store.rotate(owner)}; older ones still open.")
            for line in _left(settings, store.shelf, owner):
                NOTES.print(line)


@app.command()
@with_settings("keys", "shield_store", "shield_keys")
def rewrap(
    settings: Settings,
    to: Annotated[str | None, typer.Option(help="another provider (default: the same)")] = None,
) -> None:
    """Wrap every root by the provider's newest key, or by another provider; no page changes."""
    from kvkeep.cli.engine import opened_store
    from kvkeep.shield.providers.provider import parse_spec

    spec = None if to is None else parse_spec(to)
    with opened_store(settings) as store:
        count = store.move(spec)
    NOTES.print(f"Wrapped {count} roots{'' if to is None else f' by {to}'}.")


@app.command()
@with_settings("keys", "shield_store")
def verify(
    settings: Settings,
    receipt: Annotated[Path, typer.Argument(help="receipt of `kvkeep tenant shred`")],
    *,
    public: Annotated[str | None, typer.Option(help="the signing key, in hex")] = None,
) -> None:
    """Check a receipt against the key store's signing key, or one that was written down."""
    from kvkeep.cli.engine import key_store
    from kvkeep.shield.keystore import KeyStore
    from kvkeep.shield.receipt import read_receipt

    found = read_receipt(receipt)
    if public is None:
        own = KeyStore(key_store(settings)).read().own
        key = None if own is None else own.public
    else:
        key = _hex(public)
    said = found.check(key or bytes(32))
    OUT.print(f"{said.tenant}: {len(said.destroyed)} sets of keys destroyed {_day(said.at)}")
    for line in said.not_covered:
        OUT.print(f"  not covered: {line}")


def _left(settings: Settings, shelf_key: bytes, owner: str) -> Iterator[str]:
    """Yield how many pages of an owner a disk tier holds, by epoch; reading seals them anew."""
    from kvkeep.engine.epochs import pages_by_epoch
    from kvkeep.engine.lower import sizes_of

    folder = sizes_of(settings.tier).directory
    if folder is not None:
        for epoch, count in pages_by_epoch(folder, shelf_key, owner):
            yield f"  epoch {epoch}: {count} pages in {folder}"


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ConfigError("public: must be 64 hex digits, as `kvkeep keys status` shows") from None


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
