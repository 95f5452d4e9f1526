"""Who shares with whom: groups that the operator declared; everybody else is alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Member:
    """One account's part in a group."""

    voter: str
    """The authenticated tenant that answers for the account; all its keys are one voter."""
    group: str
    contribute: bool = True
    """Whether what it sends counts towards making content public."""
    consume: bool = True
    """Whether it reads what is public."""


class Directory:
    """The members as configured now; an account that is not in it shares nothing."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}

    def set(self, members: Mapping[str, Member]) -> None:
        """Take the members as they are from now on."""
        self._members = dict(members)

    def contributor(self, account: str) -> Member | None:
        """Return the account's part where what it sends counts."""
        member = self._members.get(account)
        return member if member is not None and member.contribute else None

    def consumer(self, account: str) -> Member | None:
        """Return the account's part where it reads what others sent."""
        member = self._members.get(account)
        return member if member is not None and member.consume else None

    def voter(self, account: str) -> str:
        """Return the tenant that answers for an account, a member or not."""
        member = self._members.get(account)
        return account if member is None else member.voter
