from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kvkeep.errors import KeysUnavailable, SealError
from kvkeep.shield.folder import (
    MANIFEST,
    Body,
    Manifest,
    check_folder,
    is_sealed,
    open_folder,
    seal_folder,
)

WEIGHTS = {"a.weights": b"one" * 1000, "b.weights": b"two" * 1000}


def mask(key: bytes | memoryview) -> bytes:
    return bytes(byte ^ 0x5A for byte in key)


def unwrap(body: Body) -> memoryview:
    return memoryview(bytearray(mask(body.wrapped)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    path.mkdir()
    for name, raw in WEIGHTS.items():
        (path / name).write_bytes(raw)
    (path / "config.json").write_text('{"layers": 2}')
    (path / "kvkeep_kv.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"pickled")
    return path


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sealed"
    body = seal_folder(source, path, tuple(WEIGHTS), lambda key, _: mask(key), "file")
    assert [entry.name for entry in body.clear] == ["config.json"]
    return path


def edited(folder: Path, change: Callable[[Body], Body]) -> None:
    """Change the manifest and leave its proof."""
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    body = msgspec.json.encode(change(msgspec.json.decode(manifest.body, type=Body)))
    raw = msgspec.json.encode(msgspec.structs.replace(manifest, body=body))
    (folder / MANIFEST).write_bytes(raw)


def test_what_was_sealed_opens_and_the_rest_is_left_out(folder: Path, source: Path) -> None:
    assert is_sealed(folder)
    assert not is_sealed(source)
    check_folder(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {MANIFEST, "config.json", *(f"{name}.sealed" for name in WEIGHTS)}
    opened = dict(open_folder(folder, unwrap))
    assert {name: bytes(file.read(0, file.plain_bytes)) for name, file in opened.items()} == WEIGHTS


def test_the_key_is_wiped_after_use(folder: Path) -> None:
    given: list[memoryview] = []

    def remembering(body: Body) -> memoryview:
        given.append(unwrap(body))
        return given[-1]

    open_folder(folder, remembering)
    (folder / "config.json").write_text("{}")
    with pytest.raises(SealError):
        open_folder(folder, remembering)
    assert [bytes(key) for key in given] == [bytes(32)] * 2


def test_a_key_that_is_not_to_be_had_is_told(folder: Path) -> None:
    def away(_: Body) -> memoryview:
        raise KeysUnavailable("away")

    with pytest.raises(KeysUnavailable):
        open_folder(folder, away)


def test_another_key_opens_nothing(folder: Path) -> None:
    with pytest.raises(SealError, match=r"sealed.manifest was changed"):
        open_folder(folder, lambda _: memoryview(bytearray(32)))


def test_files_in_the_clear_are_bound(folder: Path) -> None:
    (folder / "kvkeep_evict.json").write_text("{}")
    open_folder(folder, unwrap)
    for added in ("generation_config.json", "more.safetensors", "chat.jinja", "c.sealed"):
        (folder / added).write_text("{}")
        with pytest.raises(SealError, match=f"{added} was added"):
            open_folder(folder, unwrap)
        (folder / added).unlink()
    (folder / "config.json").write_text('{"layers": 3}')
    with pytest.raises(SealError, match=r"config.json was changed since"):
        open_folder(folder, unwrap)
    (folder / "config.json").unlink()
    with pytest.raises(SealError, match=r"config.json is missing"):
        open_folder(folder, unwrap)


def test_files_are_neither_swapped_nor_left_out(folder: Path) -> None:
    one, two = (folder / f"{name}.sealed" for name in WEIGHTS)
    raw = one.read_bytes()
    one.write_bytes(two.read_bytes())
    for check in (check_folder, lambda path: open_folder(path, unwrap)):
        with pytest.raises(SealError, match=r"a.weights.sealed: it is another file"):
            check(folder)
    one.unlink()
    with pytest.raises(SealError, match=r"a.weights.sealed can't be read: No such file"):
        check_folder(folder)
    one.write_bytes(raw[:-1])
    with pytest.raises(SealError, match=r"a.weights.sealed: it was cut short"):
        open_folder(folder, unwrap)


def test_two_sealings_of_the_same_files_do_not_mix(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    seal_folder(source, other, tuple(WEIGHTS), lambda key, _: mask(key), "file")
    shutil.copy(other / "a.weights.sealed", folder / "a.weights.sealed")
    with pytest.raises(SealError, match="another file than the manifest names"):
        open_folder(folder, unwrap)
    shutil.copy(other / MANIFEST, folder / MANIFEST)
    with pytest.raises(SealError, match=r"b.weights.sealed: it is another file"):
        open_folder(folder, unwrap)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: msgspec.structs.replace(body, sealed=body.sealed[:1]),
        lambda body: msgspec.structs.replace(body, sealed=body.sealed[::-1]),
        lambda body: msgspec.structs.replace(body, clear=()),
        lambda body: msgspec.structs.replace(body, model_id="0" * 32),
        lambda body: msgspec.structs.replace(body, provider="env"),
    ],
)
def test_a_manifest_is_not_edited(folder: Path, change: Callable[[Body], Body]) -> None:
    edited(folder, change)
    with pytest.raises(SealError, match=r"sealed.manifest was changed"):
        open_folder(folder, unwrap)


def test_what_is_no_manifest_is_refused(folder: Path) -> None:
    def outside(body: Body) -> Body:
        first = msgspec.structs.replace(body.sealed[0], name="../a.weights")
        return msgspec.structs.replace(body, sealed=(first,))

    edited(folder, lambda body: msgspec.structs.replace(body, sealed=body.sealed * 2))
    with pytest.raises(SealError, match="names files twice"):
        check_folder(folder)
    edited(folder, outside)
    with pytest.raises(SealError, match="outside of its folder"):
        check_folder(folder)
    edited(folder, lambda body: msgspec.structs.replace(body, version=2))
    with pytest.raises(SealError, match="has format 2, this kvkeep reads 1"):
        check_folder(folder)
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(SealError, match="can't be read"):
        check_folder(folder)


def test_a_folder_that_holds_something_is_left_alone(folder: Path, source: Path) -> None:
    with pytest.raises(FileExistsError, match="is not empty"):
        seal_folder(source, folder, tuple(WEIGHTS), lambda key, _: mask(key), "file")
