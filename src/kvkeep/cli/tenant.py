"""`kvkeep tenant`: who may call, with which share; a running server sees every change at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from kvkeep.cli.admin import post_admin
from kvkeep.cli.console import NOTES, OUT, make_table
from kvkeep.cli.options import new_app, with_settings
from kvkeep.config import Settings
from kvkeep.errors import ConfigError
from kvkeep.server.keys import ApiKey
from kvkeep.server.tenants import SharingTerms, Store, Tenant, TenantFile

app = new_app("Add, revoke, rotate and list tenants' keys.")

Name = Annotated[str, typer.Argument(help="tenant")]
Days = Annotated[float | None, typer.Option("--expires-days", help="end of the key's life")]


def _show(name: str, key: ApiKey) -> None:
    NOTES.print(f"The key of {name}; it is stored as a digest and not shown again:")
    OUT.print(key.text)


def _seconds(days: float | None) -> float | None:
    return None if days is None else days * 86_400


def _store(word: str) -> Store:
    for known in get_args(Store):
        if word == known:
            return cast("Store", known)
    raise ConfigError(f"store: {word!r} is neither never, memory nor disk")


def _children(pairs: list[str]) -> dict[str, float]:
    children = {}
    for pair in pairs:
        name, _, fraction = pair.partition("=")
        try:
            children[name] = float(fraction)
        except ValueError:
            raise ConfigError(f"child: {pair!r} must read NAME=FRACTION, such as a=0.5") from None
    return children


@app.command()
@with_settings("keys")
def add(
    settings: Settings,
    name: Name,
    share: Annotated[float, typer.Option(help="reserved part of the pool, 0 to 1")],
    concurrency: Annotated[int, typer.Option(help="requests at a time")] = 64,
    gateway: Annotated[bool, typer.Option("--gateway", help="may assert tenants")] = False,
    child: Annotated[list[str] | None, typer.Option(help="NAME=FRACTION of a gateway")] = None,
    expires_days: Days = None,
    group: Annotated[str | None, typer.Option(help="tenants it shares with")] = None,
    contribute: Annotated[bool, typer.Option(help="its prompts count towards sharing")] = True,
    consume: Annotated[bool, typer.Option(help="it reads what its group shares")] = True,
    store: Annotated[str, typer.Option(help="never, memory or disk")] = "disk",
    ttl_s: Annotated[float | None, typer.Option(help="seconds unused pages stay")] = None,
    coded: Annotated[bool, typer.Option(help="its long requests are coded, with kv auto")] = True,
    evict: Annotated[bool, typer.Option(help="its tokens may be evicted, with evict on")] = True,
) -> None:
    """Add a tenant and print its first key."""
    key = TenantFile(settings.keys).add(
        name,
        share=share,
        concurrency=concurrency,
        gateway=gateway,
        children=_children(child or []),
        expires_s=_seconds(expires_days),
        sharing=SharingTerms(group, contribute, consume, _store(store), ttl_s, coded, evict),
    )
    _show(name, key)


@app.command(name="set")
@with_settings("keys")
def change(
    settings: Settings,
    name: Name,
    share: Annotated[float | None, typer.Option(help="reserved part of the pool")] = None,
    concurrency: Annotated[int | None, typer.Option(help="requests at a time")] = None,
    group: Annotated[str | None, typer.Option(help="tenants it shares with; '': none")] = None,
    contribute: Annotated[bool | None, typer.Option("--contribute/--no-contribute")] = None,
    consume: Annotated[bool | None, typer.Option("--consume/--no-consume")] = None,
    store: Annotated[str | None, typer.Option(help="never, memory or disk")] = None,
    ttl_s: Annotated[
        float | None, typer.Option(help="seconds unused pages stay; 0: no end")
    ] = None,
    coded: Annotated[bool | None, typer.Option("--coded/--no-coded")] = None,
    evict: Annotated[bool | None, typer.Option("--evict/--no-evict")] = None,
) -> None:
    """Change what is given of a tenant's terms, for requests from now on."""
    given = {
        "share": share,
        "concurrency": concurrency,
        "group": group,
        "contribute": contribute,
        "consume": consume,
        "store": None if store is None else _store(store),
        "ttl_s": ttl_s,
        "coded": coded,
        "evict": evict,
    }
    terms: dict[str, object] = {field: value for field, value in given.items() if value is not None}
    if not terms:
        raise ConfigError("terms: nothing is to change; see `kvkeep tenant set --help`")
    for field in ("group", "ttl_s"):
        if field in terms:
            terms[field] = terms[field] or None
    TenantFile(settings.keys).change(name, **terms)
    NOTES.print(f"Changed {name}: {', '.join(terms)}.")


@app.command()
@with_settings("admin_host", "admin_port", "admin_socket", "admin_token_file")
def purge(settings: Settings, name: Name) -> None:
    """Drop a tenant's cached pages and votes from a running server."""
    gone = post_admin(settings, "/purge", {"tenant": name})
    NOTES.print(f"Purged {name}: {gone['pages']} pages, {gone['votes']} votes.")


@app.command()
@with_settings(
    "keys",
    "shield_store",
    "shield_keys",
    "admin_host",
    "admin_port",
    "admin_socket",
    "admin_token_file",
)
def shred(
    settings: Settings,
    name: Name,
    receipt: Annotated[Path | None, typer.Option(help="file for it (default: stdout)")] = None,
) -> None:
    """Destroy the keys of a tenant's sealed pages, wherever copies of these lie.

    With --admin-token-file a running server does it and drops the tenant's pages too; else it is
    done in the key store, and servers that use it take note at once.
    """
    from kvkeep.cli.engine import opened_store

    if settings.admin_token_file is None:
        with opened_store(settings) as store:
            document = store.shred(name)
        memory = f"A running server still has pages in memory: `kvkeep tenant purge {name}`."
    else:
        answer = post_admin(settings, "/shred", {"tenant": name})
        document = json.dumps(answer["receipt"]).encode()
        memory = f"The server dropped {answer['pages']} pages from its memory."
    if receipt is None:
        OUT.print_json(document.decode())
    else:
        receipt.write_bytes(document + b"\n")
    NOTES.print(f"Destroyed the keys of {name}'s sealed pages: no tier or backup opens them.")
    NOTES.print(memory)


@app.command()
@with_settings("keys")
def rotate(
    settings: Settings,
    name: Name,
    overlap_hours: Annotated[float, typer.Option(help="the old key's remaining life")] = 24.0,
    expires_days: Days = None,
) -> None:
    """Print a new key; the newest old one lives on for a while."""
    key = TenantFile(settings.keys).rotate(
        name, overlap_s=overlap_hours * 3600, expires_s=_seconds(expires_days)
    )
    _show(name, key)


@app.command()
@with_settings("keys")
def revoke(
    settings: Settings,
    name: Name,
    key: Annotated[str | None, typer.Option(help="id of one key (default: the tenant)")] = None,
) -> None:
    """Remove a tenant, or one of its keys; what runs under them is cancelled."""
    TenantFile(settings.keys).revoke(name, key)
    NOTES.print(f"Revoked {name if key is None else key}.")


@app.command(name="list")
@with_settings("keys")
def list_tenants(settings: Settings) -> None:
    """List tenants, shares and live keys."""
    now = time.time()
    tenants = TenantFile(settings.keys).list()
    columns: dict[str, list[object]] = {
        "tenant": [one.name for one in tenants],
        "share": [f"{one.share:g}" for one in tenants],
        "concurrency": [one.concurrency for one in tenants],
        "gateway": ["yes" if one.gateway else "" for one in tenants],
        "group": [one.group or "" for one in tenants],
        "terms": [_terms(one) for one in tenants],
        "live keys": [", ".join(key.id for key in one.keys if key.live(now)) for one in tenants],
    }
    if not any(columns["terms"]):
        del columns["terms"]
    OUT.print(make_table(tuple(columns), zip(*columns.values(), strict=True)))


def _terms(tenant: Tenant) -> str:
    """Return how a tenant's terms differ from those of a new one."""
    told = {
        "contributes nothing": not tenant.contribute,
        "reads nothing": not tenant.consume,
        f"store {tenant.store}": tenant.store != "disk",
        f"pages stay {tenant.ttl_s or 0:g} s": tenant.ttl_s is not None,
        "never coded": not tenant.coded,
        "never evicted": not tenant.evict,
    }
    return ", ".join(words for words, so in told.items() if so)
