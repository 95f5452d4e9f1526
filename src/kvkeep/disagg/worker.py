"""An engine with one side of a link beside it, in its own process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.engine import messages as m
from kvkeep.engine.client import MessageClient, Progress
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.process import PipeTransport, run_loop

if TYPE_CHECKING:
    from kvkeep.disagg.decode import DecodeSide
    from kvkeep.disagg.prefill import PrefillSide
    from kvkeep.engine.sealers import Seal


def spawn_worker(
    role: Role, engine: EngineOptions, link: LinkOptions, progress: Progress | None = None
) -> MessageClient:
    """Return a client of a worker in its own process; call inside a running event loop."""
    return MessageClient(transport_of(role, engine, link), progress)


def transport_of(role: Role, engine: EngineOptions, link: LinkOptions) -> PipeTransport:
    """Return what carries messages to a worker in its own process."""
    return PipeTransport(partial(run_worker, role, engine, link))


def run_worker(
    role: Role,
    engine: EngineOptions,
    link: LinkOptions,
    pipe: Connection,
    seal: Callable[[], Seal] | None = None,
) -> None:
    """Be a worker at the end of a pipe; `seal` makes what seals its pages on the link."""
    from kvkeep.disagg.beside import (  # noqa: PLC0415 - torch loads in this process alone
        build_beside,
        side_of,
    )
    from kvkeep.engine.sealers import transfer_seal_of  # noqa: PLC0415 - as above

    sides: list[PrefillSide | DecodeSide] = []

    def beside(inbox: m.Inbox) -> PrefillSide | DecodeSide:
        made = transfer_seal_of if seal is None else seal()
        sides.append(side_of(role, engine, link, inbox, made))
        return sides[0]

    run_loop(engine, pipe, lambda reply: build_beside(engine, sides[0], reply), beside)
