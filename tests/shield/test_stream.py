from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvkeep.errors import SealError
from kvkeep.shield.stream import HEADER_BYTES, SealedFile, look, seal_file

KEY = b"k" * 32
CHUNK = 64
SEALED = CHUNK + 16


def sealed(folder: Path, plain: bytes, name: str = "weights") -> tuple[Path, bytes]:
    (folder / name).write_bytes(plain)
    target = folder / f"{name}.sealed"
    return target, seal_file(folder / name, target, name, KEY, CHUNK)


def whole(path: Path, file_id: bytes) -> bytes:
    file = SealedFile(path, "weights", file_id, KEY)
    return bytes(file.read(0, file.plain_bytes))


def changed(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 9])
def test_any_stretch_opens_alone(tmp_path: Path, size: int) -> None:
    plain = os.urandom(size)
    path, file_id = sealed(tmp_path, plain)
    assert look(path, file_id).sealed_bytes == path.stat().st_size
    file = SealedFile(path, "weights", file_id, KEY)
    assert file.plain_bytes == size
    for begin in range(0, size + 1, 13):
        for end in {begin, min(begin + 70, size), size}:
            assert file.read(begin, end - begin) == plain[begin:end]
    with pytest.raises(SealError, match="it ends before"):
        file.read(1, size)
    if size > 32:
        assert plain[:32] not in path.read_bytes()


def test_a_flip_of_any_byte_is_seen(tmp_path: Path) -> None:
    path, file_id = sealed(tmp_path, os.urandom(2 * CHUNK + 5))
    raw = path.read_bytes()
    for at in range(len(raw)):
        changed(path, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(SealError):
            whole(path, file_id)
    changed(path, raw)
    assert len(whole(path, file_id)) == 2 * CHUNK + 5


@pytest.mark.parametrize(
    "left", [0, 10, HEADER_BYTES, *(HEADER_BYTES + SEALED * n for n in (1, 2))]
)
def test_a_file_that_was_cut_is_seen(tmp_path: Path, left: int) -> None:
    path, file_id = sealed(tmp_path, os.urandom(3 * CHUNK))
    changed(path, path.read_bytes()[:left])
    with pytest.raises(SealError, match="it was cut short"):
        look(path, file_id)


def test_a_header_that_was_made_to_fit_a_cut_opens_nothing(tmp_path: Path) -> None:
    path, file_id = sealed(tmp_path, os.urandom(3 * CHUNK))
    header = look(path, file_id)._replace(plain_bytes=2 * CHUNK).pack()
    changed(path, header + path.read_bytes()[HEADER_BYTES : HEADER_BYTES + 2 * SEALED])
    file = SealedFile(path, "weights", file_id, KEY)
    for chunk in range(2):
        with pytest.raises(SealError, match="its bytes were changed"):
            file.read(chunk * CHUNK, 1)


def test_a_file_that_is_cut_while_it_is_open_gives_nothing(tmp_path: Path) -> None:
    path, file_id = sealed(tmp_path, os.urandom(3 * CHUNK))
    file = SealedFile(path, "weights", file_id, KEY)
    for left in (HEADER_BYTES + 2 * SEALED, HEADER_BYTES + 2 * SEALED + 20):
        changed(path, path.read_bytes()[:left])
        with pytest.raises(SealError, match="its bytes were changed"):
            file.read(2 * CHUNK, CHUNK)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (0, 2)])
def test_chunks_do_not_change_places(tmp_path: Path, first: int, second: int) -> None:
    path, file_id = sealed(tmp_path, os.urandom(3 * CHUNK))
    raw = path.read_bytes()
    chunks = [raw[HEADER_BYTES + SEALED * n :][:SEALED] for n in range(3)]
    chunks[first], chunks[second] = chunks[second], chunks[first]
    file = SealedFile(changed(path, raw[:HEADER_BYTES] + b"".join(chunks)), "weights", file_id, KEY)
    for number in (first, second):
        with pytest.raises(SealError):
            file.read(number * CHUNK, CHUNK)


def test_another_files_name_key_or_bytes_open_nothing(tmp_path: Path) -> None:
    path, file_id = sealed(tmp_path, b"a" * 100)
    other, other_id = sealed(tmp_path, b"b" * 100, "others")
    with pytest.raises(SealError, match="its bytes were changed"):
        SealedFile(path, "others", file_id, KEY).read(0, 1)
    with pytest.raises(SealError, match="another key than its folder's"):
        SealedFile(path, "weights", file_id, b"x" * 32)
    with pytest.raises(SealError, match="another file than the manifest names"):
        SealedFile(other, "weights", file_id, KEY)
    mixed = path.read_bytes()[:HEADER_BYTES] + other.read_bytes()[HEADER_BYTES:]
    with pytest.raises(SealError, match="its bytes were changed"):
        SealedFile(changed(path, mixed), "weights", file_id, KEY).read(0, 1)
    assert SealedFile(other, "others", other_id, KEY).read(0, 100) == b"b" * 100


def test_what_was_added_and_other_files_are_refused(tmp_path: Path) -> None:
    path, file_id = sealed(tmp_path, b"a" * 100)
    raw = path.read_bytes()
    with pytest.raises(SealError, match="it was added to"):
        look(changed(path, raw + b"x"), file_id)
    with pytest.raises(SealError, match="no sealed file of this version"):
        look(changed(path, b"PK12" + raw[4:]), file_id)
    with pytest.raises(SealError, match="its header was changed"):
        look(changed(path, raw[:6] + b"x" + raw[7:]), file_id)


def test_equal_files_look_different(tmp_path: Path) -> None:
    paths = [sealed(tmp_path, b"a" * 1000, name)[0] for name in ("one", "two")]
    one, two = (path.read_bytes()[HEADER_BYTES:] for path in paths)
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 40
