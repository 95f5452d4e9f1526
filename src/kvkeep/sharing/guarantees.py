"""What each policy guarantees, in the words an operator reads at start."""

from __future__ import annotations

from typing import NamedTuple


class Guarantee(NamedTuple):
    """One policy's promise and whether it stands against a tenant that probes."""

    sentence: str
    safe: bool


GUARANTEES = {
    "isolate": Guarantee("no tenant's pages are read by another", safe=True),
    "selective": Guarantee(
        "a page is read by others once {k} tenants of a group beside the reader sent it", safe=True
    ),
    "dp": Guarantee(
        "one tenant changes the odds that a page is shared by at most e^{eps:g}, plus {delta:g}",
        safe=True,
    ),
    "pinned": Guarantee("only prefixes the operator declared are shared", safe=True),
    "salt": Guarantee(
        "requests with equal cache_salt share at once, those without one included", safe=False
    ),
    "safekv": Guarantee("what a detector clears is shared at once; a miss leaks", safe=False),
    "share_all": Guarantee("tenants can time each other's prompts", safe=False),
}


GROUPED = ("selective", "dp")
"""Policies under which the tenants of one group share."""


def missing_group(policy: str, *, k: int, largest: int) -> str | None:
    """Return why nothing tenants send can be shared yet; None where it can.

    `largest` is the number of tenants in the largest group.
    """
    needed = k + 1 if policy == "selective" else 1
    if policy not in GROUPED or largest >= needed:
        return None
    if largest == 0:
        return "no tenant has a group, so nothing that tenants send is shared"
    return f"no group has {needed} tenants, so nothing that tenants send is shared yet"


def describe(policy: str, *, k: int, eps: float, delta: float) -> str:
    """Return a line that names the policy and what it guarantees, or that it guarantees nothing."""
    guarantee = GUARANTEES[policy]
    sentence = guarantee.sentence.format(k=k, eps=eps, delta=delta)
    return f"{policy}: {sentence}" if guarantee.safe else f"{policy} (UNSAFE): {sentence}"
