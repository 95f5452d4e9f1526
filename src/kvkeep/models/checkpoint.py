"""A checkpoint directory as files: safetensors headers, shard index, digest; nothing is run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvkeep.errors import CheckpointError, ModelNotFound, UnsupportedModel
from kvkeep.models.shards import PlainShard, Shard, open_shards
from kvkeep.shield.folder import Unwrap, is_sealed

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DIGEST_CHUNK_BYTES = 32 << 20
MAX_HEADER_BYTES = 100_000_000
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}

Json = dict[str, Any]


class StoredTensor(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: str
    """Safetensors' name: F32, BF16 or F16."""
    shape: tuple[int, ...]
    begin: int
    """Of its bytes in the file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory whose file headers have been checked."""

    path: Path
    config: Json
    generation: Json
    """generation_config.json; empty where there is none."""
    shards: tuple[Shard, ...]
    tensors: dict[str, StoredTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the weight files; those of a sealed checkpoint as they were named before."""
        return tuple(shard.file for shard in self.shards)

    def digest(self) -> bytes:
        """Return 32 bytes over config.json and every byte of the weight files."""
        files = (PlainShard(self.path / "config.json"), *self.shards)
        spans = [span for shard in files for span in _spans(shard)]
        with ThreadPoolExecutor(max_workers=2) as pool:
            parts = list(pool.map(_hash_span, spans))
        root = hashlib.sha256(b"kvkeep-model")
        for (shard, begin, size), part in zip(spans, parts, strict=True):
            name = shard.file.name.encode()
            root.update(len(name).to_bytes(4, "little") + name)
            root.update(begin.to_bytes(8, "little") + size.to_bytes(8, "little") + part)
        return root.digest()


def open_checkpoint(path: Path, unwrap: Unwrap | None = None) -> Checkpoint:
    """Read a directory's config and headers; raises `ModelError` for what is wrong with them.

    `unwrap` gives the key of a sealed one, and raises what it will where there is none.
    """
    if not path.is_dir():
        raise ModelNotFound(f"{path} is not a directory; give a checkpoint directory or a hub id")
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"{path} has no config.json; give a Hugging Face checkpoint directory")
    config = read_json(path / "config.json")
    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    shards = _shards(path, unwrap)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in _read_header(shard):
            if name in tensors:
                first = tensors[name].file
                raise CheckpointError(f"tensor {name} is both in {first} and {shard.file}")
            tensors[name] = tensor
    _check_index(path, tensors)
    return Checkpoint(path, config, generation, shards, tensors)


def read_json(file: Path) -> Json:
    """Return a JSON object; raises `CheckpointError` where the file is not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value


def _shards(path: Path, unwrap: Unwrap | None) -> tuple[Shard, ...]:
    if not is_sealed(path):
        return tuple(PlainShard(file) for file in _weight_files(path))
    if unwrap is None:
        raise CheckpointError(f"{path} is sealed; only an engine that has its key opens it")
    return open_shards(path, unwrap)


def _weight_files(path: Path) -> Iterator[Path]:
    if (path / INDEX_NAME).is_file():
        for name in sorted(set(_weight_map(path).values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{path / INDEX_NAME} names {name!r}, not a shard beside it")
            if not (path / name).is_file():
                raise CheckpointError(f"{path / INDEX_NAME} names {name}, which is missing")
            yield path / name
    elif (path / SINGLE_NAME).is_file():
        yield path / SINGLE_NAME
    else:
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLED_SUFFIXES)
        if pickled:
            raise UnsupportedModel(f"{path} holds {pickled[0]}; only safetensors are loaded")
        raise CheckpointError(f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path / INDEX_NAME} has no `weight_map` of names to shards")
    return weight_map


def _check_index(path: Path, tensors: dict[str, StoredTensor]) -> None:
    if not (path / INDEX_NAME).is_file():
        return
    for name, file in _weight_map(path).items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{path / INDEX_NAME} says {name} is in {file}; it is not")


def _read_header(shard: Shard) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the file's tensors after checking that header and data fit its size."""
    file, size = shard.file, shard.size()
    length = int.from_bytes(shard.read(0, 8), "little") if size >= 8 else size
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{file} is truncated or not safetensors: its header is cut off")
    try:
        header = json.loads(bytes(shard.read(8, length)))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as err:
        raise CheckpointError(f"{file} is not safetensors: its header is malformed") from err
    if size != 8 + length + end:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes, its header says {8 + length + end}"
        )
    for name, entry in entries.items():
        yield name, _stored(file, name, entry, 8 + length)


def _stored(file: Path, name: str, entry: Json, data_at: int) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is not safetensors: {name} has a malformed entry") from error
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModel(f"tensor {name} has dtype {dtype}; supported are F32, BF16 and F16")
    if begin < 0 or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(f"{file} is not safetensors: {name} has {end - begin} bytes")
    return StoredTensor(file, dtype, shape, data_at + begin)


def _spans(shard: Shard) -> Iterator[tuple[Shard, int, int]]:
    size = shard.size()
    for begin in range(0, max(size, 1), DIGEST_CHUNK_BYTES):
        yield shard, begin, min(DIGEST_CHUNK_BYTES, size - begin)


def _hash_span(span: tuple[Shard, int, int]) -> bytes:
    shard, begin, size = span
    return hashlib.sha256(shard.read(begin, size)).digest()
