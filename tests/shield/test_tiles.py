"""What stands for tokens in the index under `tile`, and where its keys lie."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np

from kvkeep.shield.tiles import LABEL_BYTES, PageLabels, TileKeys
from kvkeep.types import PAGE_TOKENS


def labels(keys: TileKeys, tokens: list[int], before: bytes = b"") -> list[bytes]:
    raw = PageLabels(keys).of(tokens, before)
    return [raw[at : at + LABEL_BYTES] for at in range(0, len(raw), LABEL_BYTES)]


def test_a_label_is_bound_to_key_tokens_and_all_before_them() -> None:
    keys, page = TileKeys(), list(range(PAGE_TOKENS))
    first, second = labels(keys, page + page)
    assert first != second, "the same tokens further on"
    assert labels(keys, page) == [first]
    assert labels(keys, page, first) == [second]
    assert labels(TileKeys(), page) != [first]
    for at in range(PAGE_TOKENS):
        other = [*page[:at], page[at] + 1, *page[at + 1 :]]
        changed = labels(keys, other + page)
        assert changed[0] != first
        assert changed[1] != second


def test_rows_of_a_page_have_another_label_than_the_page() -> None:
    keys, page = TileKeys(), list(range(PAGE_TOKENS))
    assert labels(keys, page[:-1]) != labels(keys, page)
    assert len(labels(keys, page + page[:1])) == 2
    assert labels(keys, []) == []


def test_a_label_holds_no_token() -> None:
    keys, page = TileKeys(), list(range(1000, 1000 + PAGE_TOKENS))
    raw = b"".join(labels(keys, page * 8))
    ids = np.frombuffer(raw, "<i4")
    assert not np.isin(ids, page).any()


SEARCH = """
    import re, sys
    from pathlib import Path
    import numpy as np
    from kvkeep.shield.tiles import TileCipher, TileKeys, PageLabels

    keys = TileKeys()
    cipher, maker = TileCipher(keys), PageLabels(keys)
    tiles, tags = np.zeros((8, 4096), np.uint8), np.zeros((8, 16), np.uint8)
    numbers = np.arange(8, dtype=np.int32)
    for _ in range(50):
        counts = cipher.seal([tile.data for tile in tiles], tiles, tags, numbers)
        cipher.open(tiles, tags, counts, numbers, [bytearray(4096) for _ in range(8)])
        maker.of(list(range(640)))
    print(keys.kind)
    halves = [bytes(view[at : at + 16]) for view in (keys.label, keys.tile) for at in (0, 16)]
    if sys.argv[1] == "kept":
        keep = bytes(keys.tile[:16]) + bytes(1)
    turned = [bytes(b ^ 0x55 for b in half) for half in halves]
    del halves
    found = 0
    with open("/proc/self/mem", "rb", 0) as memory:
        for line in Path("/proc/self/maps").read_text().splitlines():
            if " r" not in line or "secretmem" in line or "[v" in line:
                continue
            begin, end = (int(x, 16) for x in line.split()[0].split("-"))
            try:
                memory.seek(begin)
                raw = np.frombuffer(memory.read(end - begin), np.uint8)
            except (OSError, ValueError, OverflowError):
                continue
            raw = (raw ^ 0x55).tobytes()
            found += sum(half in raw for half in turned)
    print(found)
"""


def search(how: str) -> tuple[str, int]:
    """Return where a process has its keys, and how many pieces of them its other memory holds."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SEARCH), how],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    kind, found = done.stdout.split()
    return kind, int(found)


def test_no_key_is_left_in_memory_between_calls() -> None:
    kind, found = search("idle")
    if kind == "memfd_secret":
        assert found == 0
    assert search("kept")[1] > found, "the search must find a key that is there"
