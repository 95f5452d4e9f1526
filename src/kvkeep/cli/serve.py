"""`kvkeep serve`: the engine in its own process, the public and the admin port in this one."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from kvkeep.cli.console import NOTES
from kvkeep.cli.engine import checkpoint_path, key_options, running_engine
from kvkeep.cli.options import new_app, with_settings
from kvkeep.config import Settings
from kvkeep.engine.api import EngineClient
from kvkeep.engine.sealers import shred_in
from kvkeep.errors import ConfigError
from kvkeep.fitting import UNSAFE_POLICIES
from kvkeep.server.cluster import Workers
from kvkeep.server.options import Bind, ServerLimits, ServerOptions
from kvkeep.server.serve import Listening, check_binds, check_free, serve
from kvkeep.server.store import TenantStore
from kvkeep.sharing.guarantees import describe, missing_group

app = new_app("Serve a model to several tenants over the OpenAI API.")

MIN_TOKEN_CHARS = 16


def server_options(settings: Settings) -> ServerOptions:
    """Return how the public port behaves."""
    return ServerOptions(
        served_names=(settings.served_model_name,) if settings.served_model_name else (),
        no_auth=settings.no_auth,
        drain_s=settings.drain_s,
        deadline_s=settings.deadline_s,
        audit_consent=audit_consent(settings.audit_consent_file),
        share_pool=settings.share_pool,
        shred=partial(shred_in, key_options(settings)),
        share_by_salt=settings.share == "salt",
        share_always=settings.share in ("pinned", "salt", *UNSAFE_POLICIES)
        or (settings.share != "isolate" and settings.share_pinned is not None),
        limits=ServerLimits(
            max_body_bytes=settings.max_body_bytes,
            max_n=settings.max_n,
            max_stops=settings.max_stops,
            no_auth_concurrency=settings.no_auth_concurrency,
        ),
    )


def admin_token(file: Path | None) -> str:
    """Return the admin token: the file's, or a random one for this run."""
    if file is None:
        return secrets.token_urlsafe(32)
    try:
        mode, token = file.stat().st_mode & 0o777, file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"admin_token_file: can't read {file}: {error.strerror}") from None
    if mode & 0o177:
        raise ConfigError(f"admin_token_file: {file} has mode {mode:04o}; run chmod 600 on it")
    if len(token) < MIN_TOKEN_CHARS:
        raise ConfigError(f"admin_token_file: needs at least {MIN_TOKEN_CHARS} characters")
    return token


def audit_consent(file: Path | None) -> str | None:
    """Return the token with which the operator consents to audits from other machines."""
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"audit_consent_file: can't read {file} ({error})") from None
    if len(token) < MIN_TOKEN_CHARS or not token.isprintable():
        raise ConfigError(
            f"audit_consent_file: {file} needs one line of at least {MIN_TOKEN_CHARS} characters"
        )
    return token


def announce(
    listening: Listening, settings: Settings, token: str, *, largest_group: int = 0
) -> None:
    """Say where the server listens, how to talk to it, and who can share."""
    public = listening.public.url()
    NOTES.print(f"  {'API':<16} {public}/v1")
    NOTES.print(f"  {'admin':<16} {listening.admin.url()} (/metrics, /ready)")
    if settings.admin_token_file is None:
        shown = token if sys.stderr.isatty() else "random; set --admin-token-file to know it"
        NOTES.print(f"  {'admin token':<16} {shown}")
    keys = "any key, this machine only" if settings.no_auth else f"keys of {settings.keys}"
    NOTES.print(f"  {'tenants':<16} {keys}")
    told = describe(
        settings.share, k=settings.share_k, eps=settings.share_eps, delta=settings.share_delta
    )
    NOTES.print(f"  {'sharing':<16} {told}")
    for tier in settings.tier:
        NOTES.print(f"  {'below memory':<16} {tier}")
    missing = missing_group(settings.share, k=settings.share_k, largest=largest_group)
    if missing is not None:
        remedy = "serve with --keys" if settings.no_auth else "kvkeep tenant add NAME --group GROUP"
        NOTES.print(f"  {'':<16} {missing}: {remedy}")
    NOTES.print(f"Ready. Try: kvkeep chat --url {public}")


async def _serve(settings: Settings) -> None:
    options = server_options(settings)
    public = Bind(settings.host, settings.port)
    admin = Bind(settings.admin_host, settings.admin_port, settings.admin_socket)
    check_binds(public, admin, options)
    check_free(public, admin)
    tenants = TenantStore.local() if settings.no_auth else TenantStore.open(settings.keys)
    token = admin_token(settings.admin_token_file)
    path = checkpoint_path(settings)
    from kvkeep.models.text import TextModel  # a second of imports: after what may be refused

    text = TextModel.load(path)
    largest = tenants.largest_group()
    async with _running(settings) as (client, workers):
        await serve(
            client,
            text,
            tenants,
            options,
            public=public,
            admin=admin,
            admin_token=token,
            announce=lambda listening: announce(listening, settings, token, largest_group=largest),
            workers=workers,
        )


@asynccontextmanager
async def _running(settings: Settings) -> AsyncIterator[tuple[EngineClient, Workers | None]]:
    """Start an engine beside this process, or a cluster's workers."""
    if settings.cluster is None:
        async with running_engine(settings) as (client, _):
            yield client, None
        return
    from kvkeep.cli.cluster import running_cluster

    async with running_cluster(settings) as (fleet, _):
        yield fleet, fleet.crew


@app.command(name="serve")
@with_settings()
def serve_command(settings: Settings) -> None:
    """Serve a model to several tenants over the OpenAI API."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(message)s", stream=sys.stderr, force=True
    )
    asyncio.run(_serve(settings))
