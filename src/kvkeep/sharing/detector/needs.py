"""What every match of a pattern contains, so that texts without it need not be searched.

A need is a kind of character. Every character of a match that a pattern's needs ask for is in
the text, so a text that `offers` less has no match.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from kvkeep.sharing.detector.loosen import ITEM, unquoted

DIGIT: Final = "digit"
CYRILLIC: Final = "cyrillic"
WIDE: Final = "wide"
"""Han, kana and all else from U+2E80 on."""

_NOTHING: Final[frozenset[str]] = frozenset()
_CYRILLIC: Final = range(0x400, 0x530)
_WIDE: Final = range(0x2E80, 0x110000)
_SCRIPTS: Final = {
    r"\d": DIGIT,
    r"\p{Cyrillic}": CYRILLIC,
    r"\p{Han}": WIDE,
    r"\p{Hiragana}": WIDE,
    r"\p{Katakana}": WIDE,
}
_FIRST_BYTES: Final = {
    # Small letters of one block may have their capitals in another.
    CYRILLIC: frozenset({*range(0xD0, 0xD5), 0xE1, 0xEA}),
    WIDE: frozenset(range(0xE2, 0xF5)),
}
"""First bytes in UTF-8 of the letters of each script and of their other cases."""
_OTHER_BYTES: Final = {
    script: bytes(set(range(256)) - first) for script, first in _FIRST_BYTES.items()
}
_TOKEN = re.compile(
    r"""
      (?P<optional> (?: [*?] | \{ 0+ (?: ,\d* )? \} ) \?? )
    | (?P<repeat> (?: \+ | \{ \d+ (?: ,\d* )? \} ) \?? )
    | (?P<class> \[ \^? \]? (?: \[:\^?\w+:\] | \\[xpP]\{[^}]*\} | \\. | [^\]\\] )* \] )
    | (?P<flags> \(\?[a-zA-Z-]+\) )
    | (?P<open> \( (?: \? (?: P?<\w+> | [a-zA-Z-]*: ) )? )
    | (?P<close> \) )
    | (?P<bar> \| )
    | (?P<atom> \\[xpP]\{[^}]*\} | \\x[0-9A-Fa-f]{2} | \\[pP][A-Z] | \\. | . )
    """,
    re.VERBOSE | re.DOTALL,
)


def needs(pattern: str) -> frozenset[str]:
    """Return the kinds of characters of which every match of an RE2 pattern holds one."""
    return _alternatives(_TOKEN.finditer(unquoted(pattern)))


def offers(shaped: bytes) -> frozenset[str]:
    """Return the kinds of characters that a text may hold; none that it holds is left out.

    The text is a shape: its only digits are 0 and 1.
    """
    digits = (DIGIT,) if b"0" in shaped or b"1" in shaped else ()
    if shaped.isascii():
        return frozenset(digits)
    scripts = (s for s, others in _OTHER_BYTES.items() if shaped.translate(None, others))
    return frozenset((*digits, *scripts))


def _alternatives(tokens: Iterator[re.Match[str]]) -> frozenset[str]:
    """Return what all branches up to the group's end need."""
    common: frozenset[str] | None = None
    branch = last = _NOTHING
    for token in tokens:
        kind = token.lastgroup
        if kind == "close":
            break
        if kind == "optional":
            last = _NOTHING
        elif kind == "bar":
            branch |= last
            common = branch if common is None else common & branch
            branch = last = _NOTHING
        elif kind != "repeat":
            branch |= last
            last = _alternatives(tokens) if kind == "open" else _atom(token.group())
    branch |= last
    return branch if common is None else common & branch


def _atom(text: str) -> frozenset[str]:
    if text.startswith("[") and len(text) > 1:
        items = _NOTHING if text.startswith("[^") else ITEM.findall(text[1:-1])
        kinds = {_kind(item) for item in items}
    else:
        kinds = {_kind(text)}
    return frozenset(kinds) if len(kinds) == 1 and "" not in kinds else _NOTHING


def _kind(item: str) -> str:
    """Return the kind that all characters of a letter, range or script are of, if there is one."""
    if item in _SCRIPTS:
        return _SCRIPTS[item]
    if item.startswith("\\") or len(item) not in {1, 3}:
        return ""
    first, last = ord(item[0]), ord(item[-1])
    if ord("0") <= first and last <= ord("9"):
        return DIGIT
    for kind, block in ((CYRILLIC, _CYRILLIC), (WIDE, _WIDE)):
        if first in block and last in block:
            return kind
    return ""
