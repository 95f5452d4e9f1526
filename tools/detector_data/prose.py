"""Real text without anything sensitive, for training: translated messages and program sources.

Messages come from the gettext catalogues of a machine (`/usr/share/locale`), manual pages from
`/usr/share/man` unless the benchmark has one of that name under `build/manpages`, English text and
code from installed Python packages that are not the standard library. What names authors is left
out.
"""

from __future__ import annotations

import gettext
import gzip
import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from bench.detect_text import page_text, passages
from tools.detector_data.passages import LIMIT, LOCALES

SIDES: Final = 8
"""One file of so many is validation's, one development's."""
UNSEEN, CHOOSING = 0, 1
JUDGED: Final = Path(__file__).resolve().parents[2] / "build" / "manpages" / "usr" / "share" / "man"

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
    """Passages by language, and the digest of them all."""

    seen: dict[str, tuple[str, ...]]
    """Trained on."""
    unseen: dict[str, tuple[str, ...]]
    """Of other files: for validation."""
    choosing: dict[str, tuple[str, ...]]
    """Of others again: for development."""
    digest: str


class Sources(NamedTuple):
    """Folders that prose is read from."""

    locales: Path
    manuals: Path
    packages: Path


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


def _english(root: Path) -> Iterator[Path]:
    """Yield installed packages' sources, descriptions and licences."""
    for package in PACKAGES:
        yield from sorted((root / package).rglob("*.py"))
    yield from sorted(root.glob("*.dist-info/METADATA"))
    yield from sorted(root.glob("*.dist-info/**/LICENSE*"))


def _code(path: Path) -> Iterator[str]:
    """Yield pieces of a source file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    pieces = (text[at : at + LIMIT] for at in range(0, len(text), LIMIT))
    yield from (piece for piece in pieces if not PERSONAL.search(piece))


def _manual(path: Path) -> Iterator[str]:
    """Yield passages of a manual page."""
    try:
        text = page_text(gzip.decompress(path.read_bytes()).decode("utf-8"))
    except (OSError, UnicodeDecodeError):
        return
    yield from (piece for piece in passages(text) if not PERSONAL.search(piece))


def _manuals(root: Path, folder: str) -> Iterator[Path]:
    """Yield a language's manual pages, none of a name that the benchmark reads."""
    judged = {path.name for path in (JUDGED / folder).glob("man*/*.gz")}
    pages = sorted((root / folder).glob("man*/*.gz"))
    yield from (path for path in pages if path.name not in judged)


def _sample(pieces: Iterable[str], count: int, rng: random.Random) -> tuple[str, ...]:
    """Return at most `count` pieces in random order."""
    known = sorted(set(pieces))
    rng.shuffle(known)
    return tuple(known[:count])


def _side(path: Path) -> int:
    """Return whose a file is; a package's documents go together."""
    name = next((one.name for one in path.parents if one.suffix == ".dist-info"), path.name)
    return min(hashlib.sha256(name.encode()).digest()[0] % SIDES, CHOOSING + 1)


def _language(sources: Sources, lang: str, side: int, count: int) -> tuple[str, ...]:
    """Return passages of one side of a language's files."""
    rng = random.Random(f"{lang}/{side}")
    english, folder = lang == "en", FOLDERS[lang]
    catalogues = sorted((sources.locales / folder / "LC_MESSAGES").glob("*.mo"))
    kept = [path for path in catalogues if not path.name.startswith(NAMES_OF_THINGS)]
    texts = (text for p in kept if _side(p) == side for text in _messages(p, source=english))
    messages = _sample(_joined(_sample(texts, count * 8, rng), rng), count, rng)
    if english:
        sources_read = (p for p in _english(sources.packages) if _side(p) == side)
        others = (piece for path in sources_read for piece in _code(path))
    else:
        pages = _manuals(sources.manuals, folder)
        others = (piece for p in pages if _side(p) == side for piece in _manual(p))
    return _sample((*messages, *_sample(others, count, rng)), 2 * count, rng)


def read(sources: Sources, *, count: int) -> Prose:
    """Read prose of every language, `count` pieces of each sort; where there is none, none."""
    seen, unseen, choosing = (
        {lang: _language(sources, lang, side, size) for lang in FOLDERS}
        for side, size in ((CHOOSING + 1, count), (UNSEEN, count // 5), (CHOOSING, count // 5))
    )
    whole = (text for side in (seen, unseen) for texts in side.values() for text in texts)
    return Prose(seen, unseen, choosing, hashlib.sha256("\0".join(whole).encode()).hexdigest())
