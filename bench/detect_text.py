"""Real text that holds nothing private: Debian's translated manual pages, Python's docstrings.

Both name authors and their addresses in places, which is what a detector shall find. So sections
on authors, translators and copyright are cut, and passages with an address or such a word left out.
"""

from __future__ import annotations

import ast
import gzip
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tools.detector_data.passages import LIMIT, LOCALES

ROOT: Final = Path(__file__).resolve().parents[1]
MAN_FOLDERS: Final = (ROOT / "build" / "manpages" / "usr" / "share" / "man", Path("/usr/share/man"))
"""What tools/fetch_manpages.py unpacked comes first; else what the machine has installed."""
PERSONAL: Final = re.compile(
    r"@|copyright|©|\(c\) ?\d|\bauthors?\b|written by|contributed|maintain|credit|thanks to"
    r"|translat|Autor|Verfasser|Übersetz|Auteur|traduct|Écrit par|Escrito por|Scritto da|Tradu"
    r"|作者|訳者|翻訳|著者|编写|翻译|译者|版权|Автор|переклад|написан|lizenz|licen[cs]e|ліценз",
    re.IGNORECASE,
)
ESCAPE: Final = re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\[&|^/,%:]|\\\*\(..|\\\*.")
SPECIAL: Final = {r"\-": "-", r"\(co": "©", r"\(aq": "'", r"\(dq": '"', r"\e": "\\", r"\ ": " "}
TEXT_MACROS: Final = frozenset({"B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SH", "SS", "SM"})
NOT_LIBRARY: Final = frozenset({"test", "tests", "site-packages", "idlelib", "lib2to3"})
ENCODINGS: Final = ("utf-8", "euc-jp", "gb18030")


def _unroffed(line: str) -> str:
    """Return a line of roff as text; empty for a request without text."""
    if line.startswith((".", "'")):
        macro, _, rest = line[1:].partition(" ")
        if macro not in TEXT_MACROS:
            return ""
        line = rest.replace('"', "")
    for escape, char in SPECIAL.items():
        line = line.replace(escape, char)
    return ESCAPE.sub("", line).strip()


def page_text(source: str) -> str:
    """Return a manual page's text without its sections on people."""
    lines: list[str] = []
    skipping = False
    for raw in source.splitlines():
        line = _unroffed(raw)
        if raw.startswith(".SH"):
            skipping = PERSONAL.search(line) is not None
        if line and not skipping:
            lines.append(line)
    return "\n".join(lines)


def passages(text: str) -> Iterator[str]:
    """Yield pieces of at most `LIMIT` characters that end at a line's end, impersonal ones."""
    made = ""
    for line in text.splitlines():
        if len(made) + len(line) + 1 > LIMIT and made:
            yield made
            made = ""
        made = f"{made}\n{line[:LIMIT]}" if made else line[:LIMIT]
    if len(made) >= LIMIT // 4:
        yield made


def _decoded(data: bytes) -> str:
    """Return a page in the first encoding that fits."""
    for encoding in ENCODINGS[:-1]:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode(ENCODINGS[-1], "ignore")


def _pages(lang: str, count: int, rng: random.Random, folders: Sequence[Path]) -> Iterator[str]:
    """Yield the texts of random pages of a language, of the first folder that has some."""
    for folder in folders:
        paths = sorted((folder / LOCALES[lang]).glob("man[1-8]/*.gz"))
        if len(paths) >= 50:
            for path in rng.sample(paths, min(count, len(paths))):
                yield page_text(_decoded(gzip.decompress(path.read_bytes())))
            return


def manual_passages(
    lang: str, count: int, seed: int, *, folders: Sequence[Path] = MAN_FOLDERS
) -> Sequence[str]:
    """Return random passages of a language's manual pages, none where there are no pages."""
    rng = random.Random(f"{seed}/{lang}")
    pages = _pages(lang, count, rng, folders)
    return _sample((piece for page in pages for piece in passages(page)), count, rng)


def _docstrings(count: int, rng: random.Random) -> Iterator[str]:
    """Yield the docstrings of random modules of the installed standard library, not its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    known = (path.relative_to(root) for path in root.rglob("*.py"))
    paths = sorted(path for path in known if not {*path.parts} & NOT_LIBRARY)
    for path in rng.sample(paths, min(count, len(paths))):
        tree = ast.parse((root / path).read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= LIMIT // 8:
                    yield text


def docstring_passages(count: int, seed: int) -> Sequence[str]:
    """Return random passages of Python's own docstrings."""
    rng = random.Random(seed)
    texts = _docstrings(count, rng)
    return _sample((piece for text in texts for piece in passages(text)), count, rng)


def _sample(pieces: Iterator[str], count: int, rng: random.Random) -> Sequence[str]:
    known = sorted({piece for piece in pieces if not PERSONAL.search(piece)})
    rng.shuffle(known)
    return known[:count]
