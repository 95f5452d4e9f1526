"""On which of Ray's nodes a worker runs: those of its role are spread evenly."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvkeep.disagg.options import Role

RESOURCE: Final[Mapping[Role, str]] = {"prefill": "kvkeep_prefill", "decode": "kvkeep_decode"}
"""A node that declares one of these is kept for workers of that role."""


class Places:
    """The nodes that a cluster's workers were given.

    Ray's own spreading begins at a random node for each worker, so that all of a few may come
    to lie on one. Where any node declares a role's resource, its workers go to such nodes alone.
    """

    def __init__(self) -> None:
        self._taken: dict[object, tuple[str, Role, int]] = {}
        self._lock = threading.Lock()

    def take(
        self, worker: object, role: Role, gpus: int, nodes: Iterable[Mapping[str, Any]]
    ) -> str | None:
        """Return the node that has the fewest of the role, then of all, then the least id.

        `nodes` is what Ray says of them. None where none has so many GPUs left: Ray waits.
        """
        with self._lock:
            used: Counter[str] = Counter()
            for node, _, own in self._taken.values():
                used[node] += own
            alive = [one for one in nodes if one["Alive"]]
            kept = [one for one in alive if RESOURCE[role] in one["Resources"]]
            fit = [
                one["NodeID"]
                for one in kept or alive
                if one["Resources"].get("GPU", 0) - used[one["NodeID"]] >= gpus
            ]
            if not fit:
                return None
            alike = Counter(node for node, other, _ in self._taken.values() if other == role)
            every = Counter(node for node, _, _ in self._taken.values())
            place: str = min(fit, key=lambda one: (alike[one], every[one], one))
            self._taken[worker] = (place, role, gpus)
            return place

    def leave(self, worker: object) -> None:
        """Count a worker no more; once is enough."""
        with self._lock:
            self._taken.pop(worker, None)
