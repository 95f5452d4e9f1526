"""From settings to a cluster's workers on Ray, behind the same server."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from kvkeep.cli.console import NOTES, loading_bar
from kvkeep.cli.engine import checkpoint_path, describe, engine_options
from kvkeep.config import Settings
from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import CrewOptions, Scaling
from kvkeep.disagg.options import LinkOptions, Role, TlsFiles
from kvkeep.disagg.places import Places
from kvkeep.disagg.ray_cluster import AUTO, check_links, joined
from kvkeep.disagg.workers import RayTransport
from kvkeep.engine.api import ModelInfo
from kvkeep.engine.client import MessageClient
from kvkeep.engine.given import Giver
from kvkeep.engine.options import EngineOptions, KeyOptions, SharingOptions
from kvkeep.engine.speeds import GIGABIT_BYTES, Speeds
from kvkeep.engine.terms import VOTING


def crew_options(settings: Settings) -> CrewOptions:
    """Return how many workers there are, and how they are led."""
    return CrewOptions(
        prefill=settings.cluster_prefill,
        decode=settings.cluster_decode,
        least_tokens=settings.cluster_least_tokens,
        epoch_s=settings.cluster_epoch_s,
        silence_s=settings.cluster_silence_s,
        drain_s=settings.drain_s,
        scaling=_scaling(settings),
        scale_s=settings.cluster_scale_s,
    )


def _scaling(settings: Settings) -> dict[Role, Scaling]:
    """Return which roles have workers by load."""
    asked: dict[Role, tuple[int | None, float]] = {
        "prefill": (settings.cluster_prefill_most, settings.cluster_prefill_load),
        "decode": (settings.cluster_decode_most, settings.cluster_decode_load),
    }
    return {role: Scaling(most=most, load=load) for role, (most, load) in asked.items() if most}


def link_options(settings: Settings, folder: Path | None = None) -> LinkOptions:
    """Return how pages pass between workers: on loopback, or under TLS wherever they are.

    Or through memory, where `folder` is one for their sockets.
    """
    files = None
    if settings.cluster_certificate is not None:
        files = TlsFiles(
            certificate=str(settings.cluster_certificate),
            key=str(settings.cluster_key),
            authority=str(settings.cluster_authority),
        )
    link = LinkOptions(
        tls=files, attend_apart=settings.cluster_attend_apart, speeds=speeds_of(settings)
    )
    return link if folder is None else msgspec.structs.replace(link, listen=f"shm://{folder}/")


def speeds_of(settings: Settings) -> Speeds | None:
    """Return how fast the network and workers on it are, where both are told."""
    gbit, token_ms = settings.cluster_link_gbit, settings.cluster_token_ms
    if gbit is None or token_ms is None:
        return None
    return Speeds(link_bytes_per_s=gbit * GIGABIT_BYTES, token_s=token_ms * 1e-3)


@contextmanager
def linked(settings: Settings) -> Iterator[LinkOptions]:
    """Yield how pages pass between workers, for as long as these run."""
    if not settings.cluster_shared_memory:
        yield link_options(settings)
        return
    with TemporaryDirectory(prefix="kvkeep-links-") as folder:
        yield link_options(settings, Path(folder))


def counted(share: SharingOptions) -> SharingOptions:
    """Return by whom votes are counted: by who leads the workers, once for all of them."""
    return msgspec.structs.replace(share, led=share.policy in VOTING)


def worker_options(settings: Settings, name: str, keys: KeyOptions) -> EngineOptions:
    """Return what one worker is started with: files that it alone writes, its part of the cores.

    `keys` are what it seals by.
    """
    options = engine_options(settings)
    share = counted(options.share)
    share = msgspec.structs.replace(
        share,
        state=None if share.led else _own(options.share.state, name),
        audit_log=_own(options.share.audit_log, name),
    )
    threads = options.threads
    if threads is None and settings.cluster == AUTO:
        prefill = settings.cluster_prefill_most or settings.cluster_prefill
        workers = prefill + (settings.cluster_decode_most or settings.cluster_decode)
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    tiers = tuple(_own_tier(tier, name) for tier in options.tiers)
    return msgspec.structs.replace(
        by_link(options, settings),
        share=share,
        threads=threads,
        model=model,
        tiers=tiers,
        keys=keys,
        guard_led=bool(options.guard_share),
        guard_state=None,
    )


def by_link(options: EngineOptions, settings: Settings) -> EngineOptions:
    """Return options that choose a request's form by the network between workers, if it is told."""
    gbit = settings.cluster_link_gbit if settings.kv == "auto" else None
    return msgspec.structs.replace(
        options,
        kv_auto_link_bytes_per_s=None if gbit is None else gbit * GIGABIT_BYTES,
        kv_auto_link_wait_s=settings.cluster_link_wait_s,
    )


def _own(file: str | None, name: str) -> str | None:
    return None if file is None else f"{Path(file).resolve()}.{name}"


def _own_tier(tier: str, name: str) -> str:
    """Return a tier with the worker's own folder in that of a disk."""
    kind, _, rest = tier.partition(":")
    folder, _, size = rest.rpartition(",")
    return f"disk:{Path(folder).resolve() / name},{size}" if kind == "disk" and folder else tier


def _launch(
    settings: Settings, link: LinkOptions, places: Places, giver: Giver, name: str, role: Role
) -> MessageClient:
    engine = worker_options(settings, name, giver.of(name))
    gpus = int(settings.device == "cuda")
    return MessageClient(RayTransport(name, role, engine, link, places, gpus=gpus))


@asynccontextmanager
async def running_cluster(settings: Settings) -> AsyncIterator[tuple[Fleet, ModelInfo]]:
    """Join Ray, start all workers, wait until they are warm, and end them on the way out."""
    address = settings.cluster or AUTO
    options, model = engine_options(settings), checkpoint_path(settings)
    with joined(address), linked(settings) as link, closing(Giver(options, model)) as giver:
        check_links(link)
        launch = partial(_launch, settings, link, Places(), giver)
        with loading_bar("starting workers"):
            fleet = await Fleet.start(
                launch,
                crew_options(settings),
                share=counted(options.share),
                guard=by_link(options, settings),
            )
        info = await fleet.info()
        NOTES.print(describe(info))
        counts = f"{settings.cluster_prefill} prefill, {settings.cluster_decode} decode"
        NOTES.print(f"  {'workers':<16} {counts}, on Ray ({address})")
        try:
            yield fleet, info
        finally:
            await fleet.close()
