"""Workers in processes of their own, one of which computes wrongly on coded pages."""

from __future__ import annotations

from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from kvkeep.attention.planner import FlatPlanner
from kvkeep.disagg import beside
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.worker import run_worker, spawn_worker
from kvkeep.engine.build import Parts, default_parts
from kvkeep.engine.client import MessageClient
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.process import PipeTransport


def launch(
    engine: EngineOptions, link: LinkOptions, faulty: str, name: str, role: Role
) -> MessageClient:
    """Start a worker; the one called `faulty` with a fault."""
    if name != faulty:
        return spawn_worker(role, engine, link)
    return MessageClient(PipeTransport(partial(run_faulty, role, engine, link)))


def run_faulty(role: Role, engine: EngineOptions, link: LinkOptions, pipe: Connection) -> None:
    """Be a worker whose rows come out too large where they read codes."""
    from tests.e2e.test_guard import drifting_backend

    def parts(options: EngineOptions) -> Parts:
        backend = drifting_backend(Path(options.model))
        found = default_parts(options)
        return msgspec.structs.replace(found, backend=backend, planner=FlatPlanner())

    setattr(beside, "default_parts", parts)  # noqa: B010 - it is not beside's to export
    run_worker(role, engine, link, pipe)
