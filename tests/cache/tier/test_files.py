from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvkeep.cache.tier.files import Directory, OpenFile
from kvkeep.errors import ConfigError


def test_files_of_a_directory(tmp_path: Path) -> None:
    files = Directory(tmp_path / "deep" / "tier")
    file = files.open("b")
    files.open("a")
    assert files.names() == ["a", "b", "lock"]
    assert file.write(0, memoryview(b"hello")) == 5
    assert file.write(3, memoryview(b"p me")) == 4
    file.sync()
    files.sync()
    assert (file.size(), file.read(0, 3), file.read(5, 99), file.read(9, 1)) == (
        7,
        b"hel",
        b"me",
        b"",
    )
    file.truncate(2)
    files.remove("b")
    files.remove("b")
    assert file.read(0, 9) == b"he", "a reader that holds it goes on"
    assert (tmp_path / "deep" / "tier" / "a").stat().st_mode & 0o777 == 0o600
    files.close()


def test_one_process_has_a_directory(tmp_path: Path) -> None:
    files = Directory(tmp_path)
    with pytest.raises(ConfigError, match="in use by another process"):
        Directory(tmp_path)
    files.close()
    Directory(tmp_path).close()


def test_a_place_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"tier: can't write to .*; name a directory"):
        Directory(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"tier: can't write to .*Permission denied"):
        Directory(tmp_path)


def test_memory_is_filled_up_to_the_files_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OpenFile(tmp_path / "one")
    file.write(0, memoryview(b"0123456789"))
    memory = memoryview(bytearray(b"x" * 6))
    real = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:4]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert file.fill(1, memory) == 6
    assert bytes(memory) == b"123456", "taken up again where it was cut short"
    assert file.fill(7, memory) == 3
    assert bytes(memory[:3]) == b"789"
    assert file.fill(10, memory) == 0
