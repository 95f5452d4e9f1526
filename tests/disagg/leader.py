"""A program that leads workers, says who they are, and then waits to be killed."""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial
from pathlib import Path

from kvkeep.disagg.fleet import Fleet
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.places import Places
from kvkeep.disagg.ray_cluster import joined
from kvkeep.disagg.worker import spawn_worker
from kvkeep.disagg.workers import RayTransport
from kvkeep.engine.client import MessageClient
from kvkeep.engine.options import EngineOptions


def _process(engine: EngineOptions, _: str, role: Role) -> MessageClient:
    return spawn_worker(role, engine, LinkOptions())


def _actor(engine: EngineOptions, places: Places, name: str, role: Role) -> MessageClient:
    return MessageClient(RayTransport(name, role, engine, LinkOptions(), places))


async def _lead(engine: EngineOptions, prefill: int, *, on_ray: bool) -> None:
    launch = partial(_actor, engine, Places()) if on_ray else partial(_process, engine)
    fleet = await Fleet.start(launch, CrewOptions(prefill=prefill, decode=1, epoch_s=0.2))
    pids = [str(member.info.pid) for member in fleet.crew.members.values()]
    print(os.getpid(), *pids, flush=True)  # noqa: T201 - whoever started it reads it
    await asyncio.Event().wait()


def main(model: str, prefill: str, address: str) -> None:
    """Lead workers of a model, on the Ray at an address or as processes."""
    engine = EngineOptions(
        model=str(Path(model)), threads=1, kv_cache_bytes=8 << 20, shield="off", chunk_tokens=128
    )
    if not address:
        asyncio.run(_lead(engine, int(prefill), on_ray=False))
        return
    with joined(address):
        asyncio.run(_lead(engine, int(prefill), on_ray=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
