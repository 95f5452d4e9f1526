"""Texts made of pieces of every rule's cases, of plain sentences and of what hides letters."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

CASES = Path(__file__).parent / "cases"
PLAIN = (
    "The server reads 4096 tokens at 10:45 from port 8080. ",
    "Die Überprüfung dauert 30 Sekunden; siehe §5 Abs. 2. ",
    "Le fichier n’a pas été trouvé (erreur 404). ",
    "サーバーは2024年5月に更新されました。",
    "服务器在2024年5月1日重启，版本号是1.2.3。",
    "Оновлення 12-го числа: сайт example.ua, версія 3.1а. ",
)
HARD = "0123456789 .-/@:=OlI|аеоА１２٤\u200b\u00ad\u0301﹣ｶﾞ№ﬁ号様\n\u3000\ud800ো\u09be\u1112\u1161"


@cache
def pieces() -> tuple[str, ...]:
    found = []
    for path in sorted(CASES.glob("*.toml")):
        for case in tomllib.loads(path.read_text(encoding="utf-8")).values():
            found += [*case["found"], *case["clear"]]
    return tuple(text.replace("[[", "").replace("]]", "") for text in found)


def texts(count: int, *, seed: int, hard: bool = False) -> Iterator[str]:
    """Yield texts of a few hundred characters; hard ones with letters that normalising changes."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 6)):
            piece = rng.choice(pieces() if rng.random() < 0.6 else PLAIN)
            begin = rng.randint(0, len(piece)) if rng.random() < 0.3 else 0
            parts.append(piece[begin:])
            while hard and rng.random() < 0.6:
                parts.append(rng.choice(HARD))
            parts.append(rng.choice(("", " ", "\n")))
        yield "".join(parts)
