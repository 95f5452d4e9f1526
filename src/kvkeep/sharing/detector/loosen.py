"""Make a pattern cheap to try together with hundreds of others: it may match more, never less.

An automaton over many patterns has a state for every way to stand inside each of them. Counted
repeats and digits of which only some fit multiply those ways, so that random digits or hashes
make a new state with every character. Loosened patterns read a text's shape, where every digit
but 0 is 1, and count little but digits.
"""

from __future__ import annotations

import re
from typing import Final

_SHAPE: Final = bytes.maketrans(b"23456789", b"11111111")
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
_DIGITS = re.compile(r"([0-9])(?:-([0-9]))?|\\d")
_NUMBER_GROUP = re.compile(r"[ ?:().\-/ー\\s|{},\d\[\]]*")


def shape(data: bytes) -> bytes:
    """Return a text with 1 for every digit but 0."""
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
    if text == r"\d":
        return "[01]"
    if token["digit"]:
        return min(text, "1")
    return _class(text) if token["class"] else text


def _class(text: str) -> str:
    """Return a class of what the shapes of all characters that `text` holds may be."""
    negated = text.startswith("[^")
    items = ITEM.findall(text[2:-1] if negated else text[1:-1])
    rest = [item for item in items if _DIGITS.fullmatch(item) is None]
    if len(rest) == len(items):
        return text
    digits = {digit for item in items for digit in _digits(item)}
    if negated:
        kept = f"{'0' if 0 in digits else ''}{'1' if len(digits - {0}) == 9 else ''}"
        return f"[^{kept}{''.join(rest)}]" if rest or kept else "(?s:.)"
    kept = f"{'0' if 0 in digits else ''}{'1' if digits - {0} else ''}"
    return f"[{kept}{''.join(rest)}]" if rest or len(kept) > 1 else kept


def _digits(item: str) -> range:
    """Return the digits that an item of a class stands for."""
    match = _DIGITS.fullmatch(item)
    if match is None:
        return range(0)
    first, last = match[1] or "0", match[2] or match[1] or "9"
    return range(int(first), int(last) + 1)
