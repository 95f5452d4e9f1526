"""The lexicon of the scorer: names of people and places that Faker draws, people in public life.

It is general knowledge and not filtered by what any world lists. One name of so many is left out,
so that training and validation meet names that nobody knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Final

from kvkeep.sharing.detector.features import Lexicon
from tools.detector_data.lists import drawn, foreign, inflected, public
from tools.detector_data.passages import LANGUAGES

LEFT_OUT: Final = 4
"""One name of so many is not in the lexicon."""
SHORT: Final = 4
"""Letters of a last name that alone could be anybody's."""
CLASSES: Final = (("given", "xgiven"), ("family", "xfamily"), ("city",))


def admitted(name: str) -> bool:
    """Tell whether a name is in the lexicon."""
    return hashlib.sha256(f"lexicon {name.casefold()}".encode()).digest()[0] % LEFT_OUT > 0


def _names(slots: Iterable[str]) -> Iterator[str]:
    """Yield the names of some slots in every language; in Ukrainian, in every case."""
    for slot in slots:
        yield from foreign().get(slot, ())
        for lang in LANGUAGES:
            names = drawn(lang).get(slot, ())
            yield from names
            if lang == "uk":
                yield from inflected(names)


def _known_people() -> Iterator[str]:
    """Yield public people's names, and the last word alone where it is a long one."""
    for names in public().values():
        for name in names:
            if admitted(name):
                yield name
                last = name.split()[-1]
                if last.isalpha() and len(last) > SHORT:
                    yield last


def lexicon() -> Lexicon:
    """Return the lexicon: given names, family names, places, people in public life."""
    drawn_names = [[name for name in _names(slots) if admitted(name)] for slots in CLASSES]
    return Lexicon.of([*drawn_names, list(_known_people())])
