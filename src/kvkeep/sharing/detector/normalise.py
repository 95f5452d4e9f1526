"""Undo what hides text from a pattern, and remember where every character came from.

`views` gives the text in NFKC without invisible characters first; then, only where the text calls
for it, with look-alike letters folded and with spaced-out letters joined.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from kvkeep.sharing.detector.patterns import Pattern, PatternSet

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"

_INVISIBLE: Final = (
    *(0xAD, 0x034F, 0x061C, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810)),
    *(*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0x3164),
    *(*range(0xFE00, 0xFE10), 0xFEFF, 0xFFA0, *range(0x1D173, 0x1D17B)),
    *range(0xE0000, 0xE1000),
)
_DASHES: Final = (*range(0x2010, 0x2016), 0x2212, 0xFE58, 0xFE63, 0xFF0D)
_JOINS: Final = (0x3099, 0x309A, 0xFF9E, 0xFF9F)
"""Marks that make one letter with the kana before them."""
_JAMO: Final = (range(0x1100, 0x1200), range(0xA960, 0xA980))
"""Letters that make syllables with each other."""
_IDEOGRAPHS: Final = (range(0x3400, 0xA000), range(0xAC00, 0xF900))
"""Blocks of letters that are plain as they stand; the surrogates and private use among them."""

LOOKALIKES: Final = dict(
    zip(
        "АВЕКМНОРСТУХІЈЅԌаеорсухіјѕһԁԛԝгпΑΒΕΖΗΙΚΜΝΟΡΤΥΧορνικυαƖıɑɡℓ",
        "ABEKMHOPCTYXIJSGaeopcyxijshdqwrnABEZHIKMNOPTYXopvikualiagl",
        strict=True,
    )
)
"""Cyrillic, Greek and phonetic letters that look like a Latin one."""

_FOREIGN = f"[{''.join(LOOKALIKES)}]"
_DIGIT_LIKE: Final = (
    r"\b[0-9OoQlI|][0-9OoQlI| -]*(?:(?:[0-9][ -]?){4}[OoQlI|]|[OoQlI|][ -]?(?:[0-9][ -]?){4})"
    r"[0-9OoQlI| -]*"
)
_DIGITS: Final[Mapping[int, str]] = {ord(c): d for c, d in zip("OoQlI|", "000111")}
_LETTERS_APART: Final = r"(?:\S[ \t\r\n]{1,3}){6,}\S"
_OPENS, _CLOSES = r"(?:^|[\s\"'(\[{<=:,;])", r"(?:[\s\"')\]}>.,:;!?]|$)"
_SPACED: Final = f"{_OPENS}{_LETTERS_APART}{_CLOSES}"
_DOTTED: Final = r"\b(?:[0-9A-Za-z][._/*-]){7,}[0-9A-Za-z]\b"
_MIXED: Final = (
    rf"[^\s\pZ]*(?:[0-9A-Za-z@][^\s\pZ]*{_FOREIGN}|{_FOREIGN}[^\s\pZ]*[0-9A-Za-z@])[^\s\pZ]*"
)
"""A token that holds a look-alike and a Latin letter, a digit or `@`."""
_LATIN: Final = r"[\p{Latin}\p{Han}\p{Hiragana}\p{Katakana}0-9@._:·'’-]"
_BESIDE: Final = f"{_LATIN}{_FOREIGN}|{_FOREIGN}{_LATIN}"
_UNUSUAL = Pattern(f"{_BESIDE}|{_DIGIT_LIKE}|{_SPACED}|{_DOTTED}")
_CHANGES = PatternSet((_MIXED, _DIGIT_LIKE, _SPACED, _DOTTED))
"""What folding changes: the first two; what joining does: the others."""
_FOLDING: Final = 2
_MIXED_TOKENS: Final = Pattern(_MIXED)
_FOLDS: Final = {ord(letter): plain for letter, plain in LOOKALIKES.items()}
_NUMBERS: Final = Pattern(_DIGIT_LIKE)
_SPACED_LETTERS: Final = Pattern(f"{_OPENS}({_LETTERS_APART}){_CLOSES}")
_DOTTED_LETTERS: Final = Pattern(_DOTTED)
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEPARATORS: Final = frozenset("._/*-")


class _Letters(NamedTuple):
    """How single characters become plain ones."""

    plain: dict[int, str]
    """What dashes, digits of other scripts and invisible characters stand for."""
    uneven: frozenset[int]
    """All characters that do not become exactly one, whatever stands beside them."""
    follows: frozenset[int]
    """Those that belong to the letter before them."""


def _letters() -> _Letters:
    plain = {**dict.fromkeys(_DASHES, "-"), **dict.fromkeys(_INVISIBLE, "")}
    follows = {*_INVISIBLE, *_JOINS}
    uneven = {code for block in _JAMO for code in block}
    for code in range(0x80, 0x1F000):
        if any(code in block for block in _IDEOGRAPHS):
            continue
        letter = chr(code)
        if letter.isdecimal():
            plain[code] = str(unicodedata.decimal(letter))
        if unicodedata.combining(letter):
            follows.add(code)
        elif len(unicodedata.normalize("NFKC", letter)) != 1:
            uneven.add(code)
        parts = unicodedata.decomposition(letter).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            follows.add(int(parts[1], 16))  # vowel signs are no combining marks and yet combine
    return _Letters(plain, frozenset(uneven | follows), frozenset(follows))


def _ranges(codes: Iterable[int]) -> list[list[int]]:
    """Return the first and the last of each run of neighbours."""
    ranges: list[list[int]] = []
    for code in sorted(codes):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return ranges


def _character_class(codes: Iterable[int]) -> str:
    """Return an RE2 class of some characters."""
    return "[" + "".join(rf"\x{{{a:X}}}-\x{{{b:X}}}" for a, b in _ranges(codes)) + "]"


_PUNCTUATION: Final = tuple(zip("，（）：；！？\u3000", ",():;!? ", strict=True))
"""What ordinary Chinese and Japanese text holds; NFKC as a whole costs ten times as much."""
_LETTERS: Final = _letters()
_UNEVEN = Pattern(_character_class(_LETTERS.uneven))
_CLUSTER = re.compile(
    "(?s:.)[{follows}]+|[{uneven}]".format(
        **{
            name: "".join(rf"\U{a:08X}-\U{b:08X}" for a, b in _ranges(getattr(_LETTERS, name)))
            for name in ("follows", "uneven")
        }
    )
)
"""A letter with the marks and invisible characters after it, or one that becomes several."""
_SPECIAL = Pattern(_character_class(_LETTERS.uneven | _LETTERS.plain.keys()))


class View(NamedTuple):
    """A text as recognisers read it."""

    text: str
    starts: Sequence[int] | None
    """Offset in the original of every character, then its length; None: the offsets are equal."""

    def original(self, start: int, end: int) -> tuple[int, int]:
        """Return where text[start:end] stands in the original."""
        if self.starts is None:
            return start, end
        first = self.starts[start]
        return first, max(self.starts[end], self.starts[end - 1] + 1) if end > start else first


def normalise(text: str) -> View:
    """Return the text in NFKC with plain dashes and digits, without invisible characters."""
    if text.isascii():
        return View(text, None)
    whole, data = _encodable(text)
    for wide, plain in _PUNCTUATION:
        whole = whole.replace(wide, plain)
    if _SPECIAL.search(data) is None:
        return View(unicodedata.normalize("NFKC", whole), None)
    if _UNEVEN.search(data) is None:
        return View(unicodedata.normalize("NFKC", whole).translate(_LETTERS.plain), None)
    letters: list[str] = []
    starts: list[int] = []
    done = 0
    for cluster in _CLUSTER.finditer(whole):
        begin, end = cluster.span()
        letters.append(unicodedata.normalize("NFKC", whole[done:begin]).translate(_LETTERS.plain))
        starts += range(done, begin)
        visible = cluster.group().translate(_LETTERS.plain)
        plain = unicodedata.normalize("NFKC", visible).translate(_LETTERS.plain)
        letters.append(plain)
        starts += [begin] * len(plain)
        done = end
    letters.append(unicodedata.normalize("NFKC", whole[done:]).translate(_LETTERS.plain))
    starts += range(done, len(whole) + 1)
    return View("".join(letters), starts)


def _encodable(text: str) -> tuple[str, bytes]:
    """Return the text and its UTF-8; halves of surrogate pairs count as not decodable."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        whole = _SURROGATE.sub(REPLACEMENT, text)
        return whole, whole.encode()


def _folded(pattern: Pattern, table: Mapping[int, str], text: str) -> str:
    """Return a text with its letters replaced one by one wherever a pattern matches."""
    data = text.encode()
    parts: list[str] = []
    done = 0
    for hit in pattern.hits(data):
        parts.append(data[done : hit.start].decode())
        parts.append(data[hit.start : hit.end].decode().translate(table))
        done = hit.end
    return "".join([*parts, data[done:].decode()]) if parts else text


def _fold(view: View) -> View | None:
    """Return the view with look-alikes folded in tokens of mixed script; None: there are none."""
    text = view.text if view.text.isascii() else _folded(_MIXED_TOKENS, _FOLDS, view.text)
    text = _folded(_NUMBERS, _DIGITS, text)
    return None if text == view.text else View(text, view.starts)


def _values(pattern: Pattern, text: str) -> Iterator[range]:
    """Yield where the values of a pattern's matches stand, in characters."""
    data = text.encode()
    for hit in pattern.hits(data):
        start = len(data[: hit.value[0]].decode())
        yield range(start, start + len(data[slice(*hit.value)].decode()))


def _join(view: View) -> View | None:
    """Return the view with spaced-out letters joined; None: there are none."""
    text = view.text
    dropped = {i for run in _values(_SPACED_LETTERS, text) for i in run if text[i].isspace()}
    dropped |= {i for run in _values(_DOTTED_LETTERS, text) for i in run if text[i] in _SEPARATORS}
    if not dropped:
        return None
    kept = [i for i in range(len(text)) if i not in dropped]
    starts = [*kept, len(text)]
    if view.starts is not None:
        starts = [view.starts[i] for i in starts]
    return View("".join(text[i] for i in kept), starts)


def views(text: str) -> list[View]:
    """Return the ways to read a text: normalised, then folded and joined where that differs."""
    found = [normalise(text)]
    data = found[0].text.encode()
    changes = () if _UNUSUAL.search(data) is None else _CHANGES.matching(data)
    if not changes:
        return found
    folded = _fold(found[0]) if changes[0] < _FOLDING else None
    if folded is not None:
        found.append(folded)
    joined = _join(found[-1]) if folded is not None or changes[-1] >= _FOLDING else None
    if joined is not None:
        found.append(joined)
    return found
