from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.models import memory
from kvkeep.models.loader import load
from kvkeep.ops import Ops

TINY_BYTES = 4 * (234_624 + 512 * 96)
"""Packed float32 weights of the tiny qwen2 checkpoint, its tied embedding also as plain rows."""


def test_free_memory_is_read_from_the_system(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    assert memory.available_bytes(file) == 5 * 1024
    file.write_text("MemTotal: 9 kB\n")
    assert memory.available_bytes(file) is None
    assert memory.available_bytes(tmp_path / "missing") is None


@pytest.mark.parametrize("free", [None, TINY_BYTES])
def test_enough_memory_loads(
    free: int | None,
    ops: Ops,
    shared: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    assert load(shared("qwen2"), ops=ops).spec.family == "qwen2"


def test_too_little_memory_is_said_before_loading(
    ops: Ops, shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: TINY_BYTES - 1)
    with pytest.raises(ConfigError, match=r"need 0\.0 GiB, 0\.0 GiB of memory are free"):
        load(shared("qwen2"), ops=ops)
    assert load(shared("qwen2"), ops=ops, weights="int8").spec.family == "qwen2"
