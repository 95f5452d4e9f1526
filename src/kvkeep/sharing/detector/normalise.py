"""Undo what hides text from a pattern, and remember where every character came from.

`views` gives the text in NFKC without invisible characters first; then, only where the text calls
for it, with look-alike letters folded and with spaced-out letters joined.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import re2

from kvkeep.sharing.detector.patterns import Pattern

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
_TOKEN = re2.compile(r"[^\s\pZ]+")
_DIGIT_LIKE = re2.compile(
    r"\b[0-9OoQlI|][0-9OoQlI| -]*(?:(?:[0-9][ -]?){4}[OoQlI|]|[OoQlI|][ -]?(?:[0-9][ -]?){4})"
    r"[0-9OoQlI| -]*"
)
_DIGITS: Final = str.maketrans("OoQlI|", "000111")
_SPACED = re2.compile(r"(?:^|\s)((?:\S[ \t\r\n]{1,3}){6,}\S)(?:\s|$)")
_DOTTED = re2.compile(r"\b(?:[0-9A-Za-z][._/*-]){7,}[0-9A-Za-z]\b")
_UNUSUAL = Pattern(
    "|".join(
        [
            f"[A-Za-z0-9@._:-]{_FOREIGN}|{_FOREIGN}[A-Za-z0-9@._:-]",
            _DIGIT_LIKE.pattern,
            _SPACED.pattern,
            _DOTTED.pattern,
        ]
    )
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEPARATORS: Final = frozenset("._/*-")


class _Letters(NamedTuple):
    """How single characters become plain ones."""

    plain: dict[int, str]
    """What dashes, digits of other scripts and invisible characters stand for."""
    uneven: frozenset[int]
    """All characters that do not become exactly one, whatever stands beside them."""


def _letters() -> _Letters:
    plain = {**dict.fromkeys(_DASHES, "-"), **dict.fromkeys(_INVISIBLE, "")}
    uneven = {*_INVISIBLE, *_JOINS, *range(0x1100, 0x1200), *range(0xA960, 0xA980)}
    for code in range(0x80, 0x1F000):
        if any(code in block for block in _IDEOGRAPHS):
            continue
        letter = chr(code)
        if letter.isdecimal():
            plain[code] = str(unicodedata.decimal(letter))
        if unicodedata.combining(letter) or len(unicodedata.normalize("NFKC", letter)) != 1:
            uneven.add(code)
    return _Letters(plain, frozenset(uneven))


def _character_class(codes: Iterable[int]) -> str:
    """Return an RE2 class of some characters, neighbours as a range."""
    ranges: list[list[int]] = []
    for code in sorted(codes):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(rf"\x{{{a:X}}}-\x{{{b:X}}}" for a, b in ranges) + "]"


_PUNCTUATION: Final = tuple(zip("，（）：；！？\u3000", ",():;!? ", strict=True))
"""What ordinary Chinese and Japanese text holds; NFKC as a whole costs ten times as much."""
_LETTERS: Final = _letters()
_UNEVEN = Pattern(_character_class(_LETTERS.uneven))
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
    for begin, end in _clusters(whole):
        visible = whole[begin:end].translate(_LETTERS.plain)
        cluster = unicodedata.normalize("NFKC", visible).translate(_LETTERS.plain)
        letters += cluster
        starts += [begin] * len(cluster)
    starts.append(len(whole))
    return View("".join(letters), starts)


def _encodable(text: str) -> tuple[str, bytes]:
    """Return the text and its UTF-8; halves of surrogate pairs count as not decodable."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        whole = _SURROGATE.sub(REPLACEMENT, text)
        return whole, whole.encode()


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each letter stands, with the marks and invisible characters that follow it."""
    begin = 0
    for position in range(1, len(text) + 1):
        if position < len(text) and _goes_on(text[position]):
            continue
        yield begin, position
        begin = position


def _goes_on(letter: str) -> bool:
    code = ord(letter)
    return bool(unicodedata.combining(letter) or code in _JOINS or _LETTERS.plain.get(code) == "")


def _fold(view: View) -> View | None:
    """Return the view with look-alikes folded in tokens of mixed script; None: there are none."""
    letters = list(view.text)
    if not view.text.isascii():
        for token in _TOKEN.finditer(view.text):
            word = token.group()
            if any(letter.isascii() and letter.isalnum() for letter in word) or "@" in word:
                letters[token.start() : token.end()] = [LOOKALIKES.get(c, c) for c in word]
    text = "".join(letters)
    for run in _DIGIT_LIKE.finditer(text):
        letters[run.start() : run.end()] = run.group().translate(_DIGITS)
    folded = "".join(letters)
    return None if folded == view.text else View(folded, view.starts)


def _join(view: View) -> View | None:
    """Return the view with spaced-out letters joined; None: there are none."""
    text = view.text
    dropped: set[int] = set()
    for run in _SPACED.finditer(text):
        start, end = run.span(1)
        dropped.update(i for i in range(start, end) if text[i].isspace())
    for run in _DOTTED.finditer(text):
        dropped.update(i for i in range(*run.span()) if text[i] in _SEPARATORS)
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
    if _UNUSUAL.search(found[0].text.encode()) is None:
        return found
    for change in (_fold, _join):
        view = change(found[-1])
        if view is not None:
            found.append(view)
    return found
