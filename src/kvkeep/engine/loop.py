"""Drive an engine core from a queue of commands: the body of the engine's thread or process."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from kvkeep.engine import messages as m
from kvkeep.engine.engine import EngineCore, Output
from kvkeep.errors import KvkeepError

STALL_WAIT_S = 0.002
"""How long to wait for a command while every sequence waits for a lower tier."""

log = logging.getLogger(__name__)


class Beside(Protocol):
    """What works on the engine's thread beside its loop."""

    def begin(self, core: EngineCore) -> None:
        """Hear of the core, before it is told to be ready."""

    def before(self, command: m.Command) -> None:
        """Hear of a command, before the core does."""

    def after(self, outputs: Sequence[Output]) -> None:
        """Hear of what a turn of the loop has told."""

    def close(self) -> None:
        """End, after the last turn."""


class NothingBeside:
    """The loop alone."""

    def begin(self, core: EngineCore) -> None:
        """Nothing begins."""

    def before(self, command: m.Command) -> None:
        """Nobody hears."""

    def after(self, outputs: Sequence[Output]) -> None:
        """Nobody hears."""

    def close(self) -> None:
        """Nothing to end."""


def run(
    build: Callable[[m.Sink], EngineCore],
    inbox: m.Inbox,
    reply: m.Sink,
    beside: Beside | None = None,
) -> None:
    """Build a core, then serve commands until `Stop`; a failure is told, never raised."""
    beside = beside or NothingBeside()
    try:
        core = build(reply)
        beside.begin(core)
        reply(m.Ready(core.info))
        _serve(core, inbox, reply, beside)
        core.close()
        reply(m.Stopped())
    except KvkeepError as error:
        reply(m.Failed(type(error).__name__, str(error)))
    except Exception as error:  # the loop's last line: whatever it was, clients must hear of it
        log.exception("engine failed")
        reply(m.Failed("EngineError", f"the engine failed in a step: {type(error).__name__}"))
    finally:
        beside.close()


def _serve(core: EngineCore, inbox: m.Inbox, reply: m.Sink, beside: Beside) -> None:
    while True:
        idle_s = core.epochs.left_s()
        wait = 0.0
        if core.idle() or core.stalled:
            most_s = idle_s if core.idle() else min(STALL_WAIT_S, idle_s)
            wait = core.caches.pause_s(most_s, STALL_WAIT_S)
        for command in _drain(inbox, wait):
            if isinstance(command, m.Stop):
                return
            beside.before(command)
            _handle(core, command, reply)
        if core.epochs.due():
            core.end_epoch(time.time())
        outputs = core.step()
        if outputs:
            reply(m.Outputs(tuple((o.request_id, o.chunk) for o in outputs)))
        for verdict in core.forms.verdicts():
            reply(verdict)
        beside.after(outputs)


def _drain(inbox: m.Inbox, wait: float) -> list[m.Command]:
    """Return all queued commands, waiting so long for the first."""
    commands: list[m.Command] = []
    try:
        if wait > 0:
            commands.append(inbox.get(timeout=wait))
        while True:
            commands.append(inbox.get_nowait())
    except queue.Empty:
        return commands


def _handle(core: EngineCore, command: m.Command, reply: m.Sink) -> None:
    match command:
        case m.Submit(request):
            core.submit(request)
        case m.Cancel(request_id):
            core.cancel(request_id)
        case m.Begin():
            core.begin(command)
        case m.GetStats():
            reply(m.Stats(core.stats()))
        case m.Purge(tenant):
            reply(m.PurgeDone(core.purge(tenant)))
        case m.CloseEpoch(epoch, now):
            core.sharing.end_epoch(now)
            ballots, version = core.sharing.close_epoch(epoch)
            reply(m.Votes(tuple(ballots), version))
        case m.Publish(state, now):
            core.caches.apply(core.sharing.publish(state), now)
            reply(m.Published())
        case m.SetTenants(shares, terms):
            try:
                core.set_tenants(shares, terms)
            except KvkeepError as error:
                reply(m.TenantsSet(str(error)))
            else:
                reply(m.TenantsSet(None))
