"""A sealed checkpoint: large files in sealed streams, small ones in the clear, one manifest.

The manifest names every file with its length or digest and is authenticated under the model's own
key, so that files can be neither swapped, left out, mixed with another checkpoint's, nor edited.
That key is random and wrapped by the same providers as those of pages.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from kvkeep.errors import SealError
from kvkeep.files import READABLE, replace_file
from kvkeep.shield.envelope import KEY_BYTES, Secret, model_material
from kvkeep.shield.stream import SealedFile, look, seal_file

MANIFEST: Final = "sealed.manifest"
SUFFIX: Final = ".sealed"
OWN_FILES: Final = "kvkeep_"
"""How names of files begin that are written beside a checkpoint after it was sealed."""
FORMAT: Final = 1
_CLEAR: Final = (".json", ".jinja")
"""Endings of files that stay in the clear; others are left out."""
_READ: Final = (*_CLEAR, ".safetensors", SUFFIX)
"""Endings of files that something would read: none may lie there that the manifest lacks."""


class SealedEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One sealed file."""

    name: str
    """Before it was sealed."""
    file_id: bytes


class ClearEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file in the clear."""

    name: str
    sha256: bytes


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """All files of a sealed folder, and how its key is wrapped."""

    version: int = FORMAT
    model_id: str
    provider: str
    """Kind of the provider that wraps the key."""
    wrapped: bytes
    sealed: tuple[SealedEntry, ...]
    clear: tuple[ClearEntry, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The body's bytes, and what proves them."""

    body: bytes
    proof: bytes


Unwrap = Callable[[Body], memoryview]
"""Returns the model's key, writable; it is wiped after use. Raises `SealError`, `ConfigError`."""


def is_sealed(folder: Path) -> bool:
    """Tell whether a folder holds a sealed checkpoint."""
    return (folder / MANIFEST).is_file()


def seal_folder(
    source: Path,
    target: Path,
    names: Sequence[str],
    wrap: Callable[[memoryview, str], bytes],
    provider: str,
) -> Body:
    """Write a folder's files to a new folder, those of these names sealed; returns the manifest.

    `wrap(key, model_id)` wraps the model's key. Raises `OSError`, and `FileExistsError` where the
    folder is there and holds anything.
    """
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise FileExistsError(17, "is not empty", str(target))
    model_id = secrets.token_hex(16)
    key = memoryview(bytearray(secrets.token_bytes(KEY_BYTES)))
    try:
        wrapped = wrap(key, model_id)
        sealed = tuple(_seal(source, target, name, key) for name in names)
        clear = tuple(
            _copy(path, target)
            for path in sorted(source.iterdir())
            if path.is_file() and path.suffix in _CLEAR and not path.name.startswith(OWN_FILES)
        )
        body = Body(
            model_id=model_id, provider=provider, wrapped=wrapped, sealed=sealed, clear=clear
        )
        raw = msgspec.json.encode(body)
        manifest = Manifest(body=raw, proof=_proof(key, raw))
    finally:
        key[:] = bytes(KEY_BYTES)
    replace_file(target / MANIFEST, msgspec.json.encode(manifest) + b"\n", READABLE)
    return body


def read_body(folder: Path) -> Body:
    """Return what a sealed folder's manifest says, unproven; raises `SealError`."""
    return _read(folder)[0]


def check_folder(folder: Path) -> None:
    """Hold a folder's sealed files against its manifest as far as no key is needed.

    Raises `SealError` where one is missing, cut short or another's.
    """
    for entry in _read(folder)[0].sealed:
        with _naming(entry):
            look(folder / (entry.name + SUFFIX), entry.file_id)


def open_folder(folder: Path, unwrap: Unwrap) -> tuple[tuple[str, SealedFile], ...]:
    """Return a folder's sealed files by their names before, proven to be sealed together.

    Raises `SealError` where anything differs, and what `unwrap` raises.
    """
    body, manifest = _read(folder)
    key = unwrap(body)
    try:
        if not hmac.compare_digest(manifest.proof, _proof(key, manifest.body)):
            raise SealError(f"{MANIFEST} was changed")
        _check_clear(folder, body)
        return tuple((entry.name, _opened(folder, entry, key)) for entry in body.sealed)
    finally:
        key[:] = bytes(len(key))


def _seal(source: Path, target: Path, name: str, key: Secret) -> SealedEntry:
    file_id = seal_file(source / name, target / (name + SUFFIX), name, key)
    return SealedEntry(name=name, file_id=file_id)


def _copy(path: Path, target: Path) -> ClearEntry:
    raw = path.read_bytes()
    replace_file(target / path.name, raw, READABLE)
    return ClearEntry(name=path.name, sha256=hashlib.sha256(raw).digest())


def _read(folder: Path) -> tuple[Body, Manifest]:
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        body = msgspec.json.decode(manifest.body, type=Body)
    except (OSError, msgspec.MsgspecError):
        raise SealError(f"{MANIFEST} can't be read") from None
    if body.version != FORMAT:
        raise SealError(f"{MANIFEST} has format {body.version}, this kvkeep reads {FORMAT}")
    names = [*(entry.name for entry in body.sealed), *(entry.name for entry in body.clear)]
    if any(Path(name).name != name for name in names) or len(set(names)) != len(names):
        raise SealError(f"{MANIFEST} names files twice, or outside of its folder")
    return body, manifest


def _check_clear(folder: Path, body: Body) -> None:
    """Hold the files in the clear against the manifest; raises `SealError`."""
    for entry in body.clear:
        path = folder / entry.name
        if not path.is_file():
            raise SealError(f"{entry.name} is missing")
        if hashlib.sha256(path.read_bytes()).digest() != entry.sha256:
            raise SealError(f"{entry.name} was changed since it was sealed with the weights")
    known = {e.name for e in body.clear} | {e.name + SUFFIX for e in body.sealed}
    for path in sorted(folder.iterdir()):
        own = path.name.startswith(OWN_FILES)
        if path.suffix in _READ and path.name not in known and not own:
            raise SealError(f"{path.name} was added to it; take it away, or seal it all again")


def _opened(folder: Path, entry: SealedEntry, key: Secret) -> SealedFile:
    with _naming(entry):
        return SealedFile(folder / (entry.name + SUFFIX), entry.name, entry.file_id, key)


@contextmanager
def _naming(entry: SealedEntry) -> Iterator[None]:
    """Put a sealed file's name before what is wrong with it."""
    name = entry.name + SUFFIX
    try:
        yield
    except SealError as error:
        raise SealError(f"{name}: {error}") from None
    except OSError as error:
        raise SealError(f"{name} can't be read: {error.strerror}") from None


def _proof(key: Secret, body: bytes) -> bytes:
    return hmac.digest(model_material(key, b"manifest"), body, "sha256")
