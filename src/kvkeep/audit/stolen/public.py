"""What public weights say of layer 0: the key and the value that each token of a vocabulary has.

Layer 0 sees a token's embedding alone, so its values are a table of the vocabulary, and its keys
are one but for the rotation by position.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvkeep.errors import CheckpointError, ModelNotFound

FloatArray = NDArray[np.float32]

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BLOCK: Final = 8192
"""Tokens computed at a time."""


@dataclass(frozen=True, slots=True)
class PublicModel:
    """Layer 0 of a model for every token of its vocabulary."""

    keys: FloatArray
    """[V, Hkv, D] before the rotation by position."""
    values: FloatArray
    """[V, Hkv, D]."""
    num_layers: int
    dtype: str
    """Of the model as its config names it: float32, bfloat16 or float16."""
    v_proj: FloatArray
    """[Hkv * D, hidden], which folded weights are compared with."""

    @property
    def vocab_size(self) -> int:
        """Return V."""
        return len(self.values)

    @property
    def heads(self) -> int:
        """Return Hkv."""
        return int(self.values.shape[1])

    @property
    def head_dim(self) -> int:
        """Return D."""
        return int(self.values.shape[2])


def open_public(path: Path) -> PublicModel:
    """Compute the tables of a checkpoint directory; raises `ModelError`."""
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"{path} has no config.json; give a Hugging Face checkpoint directory")
    config = _json(path / "config.json")
    tensors = _Tensors(path)
    try:
        heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
        eps, layers = float(config.get("rms_norm_eps", 1e-6)), int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} lacks or garbles {error}") from None
    embedding = tensors.read("model.embed_tokens.weight")
    norm = tensors.read("model.layers.0.input_layernorm.weight")

    def table(name: str, weight: FloatArray) -> FloatArray:
        bias = tensors.find(f"model.layers.0.self_attn.{name}.bias")
        begins = range(0, len(embedding), _BLOCK)
        parts = [_normed(embedding[i : i + _BLOCK], eps) * norm @ weight.T for i in begins]
        rows: FloatArray = np.concatenate(parts, dtype=np.float32)
        found = rows if bias is None else rows + bias
        return found.reshape(len(rows), heads, -1)

    k_proj, v_proj = (
        tensors.read(f"model.layers.0.self_attn.{name}.weight") for name in ("k_proj", "v_proj")
    )
    keys, values = table("k_proj", k_proj), table("v_proj", v_proj)
    k_norm = tensors.find("model.layers.0.self_attn.k_norm.weight")
    if k_norm is not None:
        keys = _normed(keys, eps) * k_norm
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return PublicModel(keys, values, layers, dtype, v_proj)


def _normed(x: FloatArray, eps: float) -> FloatArray:
    found: FloatArray = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps))
    return found


class _Tensors:
    """Tensors of safetensors files by name, as float32."""

    def __init__(self, path: Path) -> None:
        self._path = path
        names = {_SINGLE}
        if (path / _INDEX).is_file():
            names = {str(name) for name in _json(path / _INDEX).get("weight_map", {}).values()}
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for name in sorted(names):
            file = path / Path(name).name
            begin, header = _header(file)
            self._entries.update({key: (file, begin, entry) for key, entry in header.items()})

    def read(self, name: str) -> FloatArray:
        """Return a tensor; raises `CheckpointError` where there is none."""
        found = self.find(name)
        if found is None:
            raise CheckpointError(f"{self._path} lacks tensor {name}")
        return found

    def find(self, name: str) -> FloatArray | None:
        """Return a tensor, or None where there is none."""
        if name not in self._entries:
            return None
        file, begin, entry = self._entries[name]
        try:
            shape = tuple(int(size) for size in entry["shape"])
            dtype, at = _DTYPES[entry["dtype"]], begin + int(entry["data_offsets"][0])
            with file.open("rb") as stream:
                stream.seek(at)
                raw = np.fromfile(stream, dtype, math.prod(shape))
            return _widened(raw, bf16=entry["dtype"] == "BF16").reshape(shape)
        except (KeyError, ValueError, TypeError, IndexError, OSError) as error:
            raise CheckpointError(f"{file} can't be read at tensor {name}: {error}") from None


def _widened(raw: NDArray[Any], *, bf16: bool) -> FloatArray:
    if bf16:
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)


def _header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return where a file's data begins and its entries."""
    try:
        with file.open("rb") as stream:
            length = min(int.from_bytes(stream.read(8), "little"), file.stat().st_size)
            header = json.loads(stream.read(length))
        return 8 + length, {key: entry for key, entry in header.items() if key != "__metadata__"}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return found
