"""Make a pattern cheap to try together with hundreds of others: it may match more, never less.

An automaton over many patterns has a state for every way to stand inside each of them. Counted
repeats and digits of which only some fit multiply those ways, so that random digits or hashes
make a new state with every character. Loosened patterns read a text's shape, where every digit
is 0, and count little but digits.
"""

from __future__ import annotations

import re
from typing import Final

_SHAPE: Final = bytes.maketrans(b"123456789", b"000000000")
_MOST_COUNTED: Final = 3
_TOKEN = re.compile(
    r"""
      (?P<repeat> \{ (?P<least>\d+) (?: , (?P<most>\d*) )? \} )
    | (?P<class> \[ \^? \]? (?: \[:\^?\w+:\] | \\[xpP]\{[^}]*\} | \\. | [^\]\\] )* \] )
    | (?P<escape> \\[xpP]\{[^}]*\} | \\x[0-9A-Fa-f]{2} | \\[pP][A-Z] | \\. )
    | (?P<digit> \d )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
ITEM: Final = re.compile(
    r"\[:\^?\w+:\]|\\[xpP]\{[^}]*\}|\\x[0-9A-Fa-f]{2}|\\.|.-[^\\]|.", re.DOTALL
)
"""One item of a character class."""
_QUOTED = re.compile(r"\\Q(.*?)(?:\\E|$)|(\\.)", re.DOTALL)
_DIGITS = re.compile(r"\d(?:-\d)?|\\d")
_NUMBER_GROUP = re.compile(r"[0 ?:().\-/ー\\s|{},\d\[\]]*")


def shape(data: bytes) -> bytes:
    """Return a text with 0 for every digit."""
    return data.translate(_SHAPE)


def unquoted(pattern: str) -> str:
    r"""Return a pattern with what stands between `\Q` and `\E` escaped letter by letter."""
    if r"\Q" not in pattern:
        return pattern
    return _QUOTED.sub(lambda part: part[2] or re.escape(part[1]), pattern)


def loosened(pattern: str) -> str:
    """Return a pattern that matches the shape of every text that `pattern` matches."""
    parts: list[str] = []
    opened: list[int] = []
    last = 0
    for token in _TOKEN.finditer(unquoted(pattern)):
        text = token.group()
        if token["repeat"]:
            counted = _NUMBER_GROUP.fullmatch("".join(parts[last:])) is not None
            parts.append(text if counted else _repeat(int(token["least"])))
            continue
        last = opened.pop() if text == ")" and opened else len(parts)
        if text == "(":
            opened.append(len(parts))
        parts.append(_plain(token))
    return "".join(parts)


def _repeat(least: int) -> str:
    return f"{{{min(least, _MOST_COUNTED)},}}" if least else "*"


def _plain(token: re.Match[str]) -> str:
    """Return an atom that fits the shape of all that the token fits."""
    text = token.group()
    if token["digit"] or text == r"\d":
        return "0"
    return _class(text) if token["class"] else text


def _class(text: str) -> str:
    """Return a class that holds 0 for any digit that `text` holds, or excludes it with all ten."""
    negated = text.startswith("[^")
    items = ITEM.findall(text[2:-1] if negated else text[1:-1])
    rest = [item for item in items if _DIGITS.fullmatch(item) is None]
    if len(rest) == len(items):
        return text
    if not negated:
        return f"[0{''.join(rest)}]" if rest else "0"
    all_ten = "0-9" in items or r"\d" in items
    return f"[^{'0' if all_ten else ''}{''.join(rest)}]" if rest or all_ten else "(?s:.)"
