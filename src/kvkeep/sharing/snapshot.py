"""What is public in one epoch, and to whom: immutable between two epochs' ends."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvkeep.sharing.ledger import Key, Unit


class Entry(msgspec.Struct, frozen=True):
    """A public unit and the last epochs in which it may be read."""

    pages: tuple[bytes, ...]
    above: bytes | None
    depth: int
    until: int
    """By who is not in `voters`."""
    voters_until: int
    """By who is: its own vote does not count for itself."""
    voters: frozenset[str]

    @classmethod
    def of(cls, unit: Unit, until: int, voters_until: int, voters: frozenset[str]) -> Entry:
        """Return a unit's entry."""
        return cls(unit.pages, unit.above, unit.depth, until, voters_until, voters)

    def readable(self, voter: str, epoch: int) -> bool:
        """Tell whether a tenant may read it in an epoch."""
        return epoch <= (self.voters_until if voter in self.voters else self.until)


class Snapshot(msgspec.Struct, frozen=True):
    """The public units of one epoch in the order in which they get their places."""

    epoch: int = 0
    entries: Mapping[Key, Entry] = msgspec.field(default_factory=dict[Key, Entry])

    def readable(self, group: str, unit: bytes, voter: str) -> bool:
        """Tell whether a tenant of a group may read a unit."""
        entry = self.entries.get((group, unit))
        return entry is not None and entry.readable(voter, self.epoch)

    def pages(self) -> dict[bytes, None]:
        """Return the pages of all units in order, each once."""
        return {page: None for entry in self.entries.values() for page in entry.pages}


def advance(old: Snapshot, changed: Mapping[Key, Entry | None], epoch: int) -> Snapshot:
    """Return the next epoch's snapshot.

    `changed` holds what was decided anew, None for what stays as it was. Units keep their places;
    new ones follow, the shallow first, then by name. A unit without the one it continues is not
    public.
    """
    entries = {key: changed.get(key) or entry for key, entry in old.entries.items()}
    fresh = [(key, entry) for key, entry in changed.items() if entry and key not in old.entries]
    entries.update(sorted(fresh, key=lambda item: (item[1].depth, item[0])))
    kept: dict[Key, Entry] = {}
    for (group, name), entry in entries.items():
        above = entry.above
        if epoch <= entry.until and (above is None or (group, above) in kept):
            kept[group, name] = entry
    return Snapshot(epoch, kept)
