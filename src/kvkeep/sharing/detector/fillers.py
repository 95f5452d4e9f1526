"""What stands where a name or a value belongs and is none: offices, samples, types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_NOBODY: Final = frozenset(
    [
        "sir",
        "madam",
        "all",
        "world",
        "team",
        "customer",
        "customers",
        "everyone",
        "everybody",
        "colleagues",
        "friends",
        "support",
        "president",
        "speaker",
        "chairman",
        "chairwoman",
        "minister",
        "ambassador",
        "secretary",
        "board",
        "committee",
        "user",
        "name",
        "guest",
        "client",
        "someone",
        "anyone",
        "test",
        "foo",
        "example",
        "sample",
        "präsident",
        "präsidentin",
        "vorsitzender",
        "vorsitzende",
        "ministerin",
        "kanzler",
        "kanzlerin",
        "bürgermeister",
        "kunde",
        "kundin",
        "kunden",
        "vorstand",
        "zusammen",
        "président",
        "présidente",
        "ministre",
        "directeur",
        "directrice",
        "maire",
        "tous",
        "toutes",
        "presidente",
        "ministro",
        "ministra",
        "director",
        "directora",
        "alcalde",
        "todos",
        "todas",
        "cliente",
        "direttore",
        "sindaco",
        "tutti",
        "ministri",
        "equipo",
        "equipe",
        "squadra",
        "mundo",
        "mondo",
        "monde",
        "ihr",
        "ihre",
        "votre",
        "vostra",
        "kundendienst",
        "your",
        "our",
        "unser",
        "mein",
        "my",
        "this",
        "that",
        "here",
        "there",
        "thank",
        "пане",
        "пані",
        "клієнте",
        "друзі",
        "колеги",
        "голово",
        "усіх",
        "всіх",
        "правління",
        "null",
        "none",
        "true",
        "false",
    ]
)
_UNFILLED: Final = frozenset(
    [
        "string",
        "str",
        "text",
        "none",
        "null",
        "nil",
        "true",
        "false",
        "undefined",
        "type",
        "object",
        "array",
        "list",
        "dict",
        "optional",
        "required",
        "unknown",
        "example",
        "todo",
        "tbd",
        "n/a",
        "na",
        "empty",
        "field",
        "name",
        "value",
        "see",
        "the",
        "a",
        "an",
        "of",
        "if",
    ]
)
_SAMPLES: Final = frozenset(
    [
        "john doe",
        "jane doe",
        "jane roe",
        "john q. public",
        "john smith",
        "jane smith",
        "some user",
        "your name",
        "full name",
        "example person",
        "jane example",
        "test customer",
        "test user",
        "foo bar",
        "joe bloggs",
        "max mustermann",
        "erika mustermann",
        "erika musterfrau",
        "max muster",
        "jean dupont",
        "mario rossi",
        "mario bianchi",
        "juan pérez",
        "juan perez",
        "山田太郎",
        "山田 太郎",
        "山田花子",
        "佐藤次郎",
        "佐藤 次郎",
        "鈴木一郎",
        "鈴木 一郎",
        "张三",
        "李四",
        "王五",
        "王小明",
        "іван іваненко",
        "петро петренко",
        "тест тестенко",
    ]
)


_BEFORE: Final = frozenset(
    [
        *("the", "das", "der", "die", "la", "le", "el", "il", "los", "les", "gli"),
        *("professor", "doktor", "direktor", "monsieur", "madame", "señor", "señora", "signora"),
        *("signore", "signor", "señoría", "señorías", "onorevole", "onorevoli", "judge"),
        *("先生", "女士"),
    ]
)
"""Articles and titles: they stand before a name, and articles end some; alone they are none."""


_FORM_PLACE = re.compile(
    r"1,? rue de la paix|rue de la paix, 75000|via roma,? ?1$|calle mayor,? ?1$"
    r"|(?:12345|75000|00100) \w"
)
"""Streets and postal codes that forms show in French, Italian, Spanish and German."""


def person(value: str) -> bool:
    """Tell whether a name is neither an office, a form of address nor a form's sample."""
    words = value.casefold().split()
    while words and words[0] in _BEFORE:
        words = words[1:]
    while len(words) > 1 and words[-1] in _BEFORE:
        words = words[:-1]
    if not words or words[0] in _NOBODY or words[-1] in _NOBODY:
        return False
    return not _sample(words)


def _sample(words: Sequence[str]) -> bool:
    return " ".join(words) in _SAMPLES


def somebody(value: str) -> bool:
    """Tell whether anything but offices, forms of address and a form's samples is in a name."""
    words = value.casefold().split()
    return not all(word in _BEFORE or word in _NOBODY for word in words) and not _sample(words)


def filled(value: str) -> bool:
    """Tell whether a field holds more than the type or the absence of a value."""
    return value.casefold().split()[0] not in _UNFILLED


def real_place(value: str) -> bool:
    """Tell whether an address is none of those that forms show as an example."""
    word = value.lower()
    fillers = ("example", "sample", "muster", "placeholder", "exemple", "ejemplo", "esempio")
    known = ("123 main", "1 main st", "10 downing", "1600 pennsyl", "anytown", "calle falsa")
    return not any(part in word for part in (*fillers, *known)) and not _FORM_PLACE.match(word)
