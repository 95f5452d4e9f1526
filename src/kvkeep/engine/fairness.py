"""Deficit round robin: which tenant may spend a step's prefill tokens next."""

from __future__ import annotations

from collections.abc import Callable

NextCost = Callable[[str], int | None]
"""Return the tokens of a tenant's next piece of work, or None where it has none."""

Take = Callable[[str], None]
"""Schedule that piece."""


class DeficitRoundRobin:
    """Turns in a fixed order; a turn adds a quantum to a tenant's deficit, work spends it.

    Source: Shreedhar and Varghese, 1996. A tenant without work loses its deficit.
    """

    def __init__(self, quantum_tokens: int) -> None:
        self._quantum = quantum_tokens
        self._ring: list[str] = []
        self._deficits: dict[str, int] = {}
        self._turn = 0
        self._fresh = True

    def set_tenants(self, tenants: list[str]) -> None:
        """Replace the ring; deficits of tenants that stay are kept."""
        current = self._ring[self._turn] if self._ring else None
        self._ring = sorted(tenants)
        self._deficits = {name: self._deficits.get(name, 0) for name in self._ring}
        if current in self._deficits:
            self._turn = self._ring.index(current)
        else:
            self._turn, self._fresh = 0, True

    def spend(self, budget_tokens: int, next_cost: NextCost, take: Take) -> None:
        """Take work in turn until the budget is spent or nobody has any."""
        idle = 0
        while self._ring and idle < len(self._ring):
            tenant = self._ring[self._turn]
            cost = next_cost(tenant)
            if cost is None:
                self._deficits[tenant] = 0
                idle += 1
                self._pass_on()
                continue
            idle = 0
            if self._fresh:
                self._deficits[tenant] += self._quantum
                self._fresh = False
            if cost > self._deficits[tenant]:
                self._pass_on()
                continue
            if cost > budget_tokens:
                return
            take(tenant)
            self._deficits[tenant] -= cost
            budget_tokens -= cost

    def _pass_on(self) -> None:
        self._turn = (self._turn + 1) % len(self._ring)
        self._fresh = True
