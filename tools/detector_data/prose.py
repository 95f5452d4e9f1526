"""Real text without anything sensitive, for training: translated messages and program sources.

Messages come from the gettext catalogues of a machine (`/usr/share/locale`), English text and code
from installed Python packages that are not the standard library. What names authors is left out.
"""

from __future__ import annotations

import gettext
import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tools.detector_data.passages import LIMIT, LOCALES

FOLDERS: Final = {"en": "de", **LOCALES}
"""English is what the German catalogues translate."""
PACKAGES: Final = ("numpy", "torch/nn", "transformers/models/llama", "httpx", "starlette", "rich")
PERSONAL: Final = re.compile(
    r"@|copyright|\(c\)|©|author|written by|translat|credit|maintain|Autor|Verfasser|Übersetz"
    r"|traduct|Auteur|Écrit par|Escrito|Scritto|Traduz|作者|訳者|翻訳|编写|翻译|Автор|Переклад|https?://",
    re.IGNORECASE,
)
NAMES_OF_THINGS: Final = ("iso_", "xkeyboard", "wireless", "dates", "tzdata")
"""Catalogues of names of countries, languages, keyboards: lists, not prose."""


class Prose(NamedTuple):
    """Passages by language and the digest of what they were cut from."""

    passages: dict[str, tuple[str, ...]]
    digest: str


def _messages(path: Path, *, source: bool = False) -> Iterator[str]:
    """Yield a catalogue's messages that read like text, translated or in English."""
    try:
        with path.open("rb") as stream:
            catalogue = gettext.GNUTranslations(stream)
    except (UnicodeDecodeError, OSError):
        return  # a catalogue in another encoding
    known: object = catalogue._catalog  # type: ignore[attr-defined]  # noqa: SLF001
    assert isinstance(known, dict)
    for key, value in known.items():
        text = key if source else value
        if key and isinstance(text, str) and len(text) > 15 and not PERSONAL.search(text):
            yield text


def _joined(texts: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Yield passages of some texts one after the other, at most `LIMIT` characters."""
    made = ""
    for text in texts:
        joint = rng.choice((" ", "\n", "\n"))
        if len(made) + len(text) + 1 > LIMIT:
            yield made[:LIMIT]
            made = ""
        made = f"{made}{joint}{text}" if made else text
    if made:
        yield made[:LIMIT]


def _sources(root: Path) -> Iterator[str]:
    """Yield pieces of installed packages' sources."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            pieces = (text[at : at + LIMIT] for at in range(0, len(text), LIMIT))
            yield from (piece for piece in pieces if not PERSONAL.search(piece))


def _sample(pieces: Iterable[str], count: int, rng: random.Random) -> tuple[str, ...]:
    """Return at most `count` pieces in random order."""
    known = sorted(set(pieces))
    rng.shuffle(known)
    return tuple(known[:count])


def read(locales: Path, packages: Path, *, count: int, seed: int) -> Prose:
    """Read prose of every language; languages without a catalogue have none."""
    rng = random.Random(seed)
    code = _sample(_sources(packages), count, rng)
    found = {}
    for lang, folder in FOLDERS.items():
        catalogues = sorted((locales / folder / "LC_MESSAGES").glob("*.mo"))
        kept = [path for path in catalogues if not path.name.startswith(NAMES_OF_THINGS)]
        english = lang == "en"
        texts = (text for path in kept for text in _messages(path, source=english))
        found[lang] = _sample(_joined(_sample(texts, count * 8, rng), rng), count, rng)
    found["en"] = (*found["en"], *code)
    digest = hashlib.sha256("\0".join(t for texts in found.values() for t in texts).encode())
    return Prose(found, digest.hexdigest())
