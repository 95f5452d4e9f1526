"""Sequences whose step is worth nothing: what they attended to, or computed, can't be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from kvkeep.cache.caches import Caches
from kvkeep.engine.runner import ModelRunner, Stepped
from kvkeep.engine.scheduler import Scheduler
from kvkeep.engine.sequence import Status
from kvkeep.engine.work import Work


def begin_anew(
    work: Iterable[Work],
    stepped: Stepped,
    runner: ModelRunner,
    caches: Caches,
    scheduler: Scheduler,
) -> None:
    """Let sequences be computed again whose pages were changed in memory by somebody else.

    What they computed before stays; the changed pages leave the index, with what continues them.
    """
    if not stepped.changed:
        return
    changed = np.fromiter(stepped.changed, np.int32)
    held = [item for item in work if np.isin(runner.tiles_of(item.view), changed).any()]
    for item in held:
        item.view.taint(item.start)
    for manager in caches.managers.values():
        manager.losses.lose(changed)
    for item in held:
        scheduler.park(item.sequence)
        scheduler.resume(item.sequence)


def running(work: Iterable[Work]) -> Iterator[Work]:
    """Yield the work of sequences that still run."""
    return (item for item in work if item.sequence.status is Status.RUNNING)
