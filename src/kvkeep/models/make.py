"""Write random checkpoints in Hugging Face's layout: real shapes for speed, tiny for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kvkeep.errors import ConfigError
from kvkeep.models.check import ARCHITECTURES
from kvkeep.models.checkpoint import INDEX_NAME, SINGLE_NAME
from kvkeep.models.make_tokenizer import SpecialIds, write_tokenizer
from kvkeep.models.shapes import LIKE, TINY, TINY_COMMON, Fields

SHARD_BYTES = 2 << 30
INIT_STD = 0.02
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FUSED_EXPERTS = "mlp.experts."

DtypeName = Literal["bfloat16", "float32"]


def make(
    like: str, out: Path, *, seed: int = 0, layers: int | None = None, dtype: DtypeName = "bfloat16"
) -> Path:
    """Write a checkpoint with the shapes of a known model and return its directory."""
    if like not in LIKE:
        raise ConfigError(f"--like {like} is unknown; choose one of {', '.join(LIKE)}")
    fields = dict(LIKE[like])
    if layers is not None:
        if layers < 1:
            raise ConfigError("--layers must be at least 1")
        fields["num_hidden_layers"] = layers
    return _write(fields, out, seed, dtype, INIT_STD, SHARD_BYTES)


def tiny(
    family: str,
    out: Path,
    *,
    seed: int = 0,
    tied: bool = True,
    dtype: DtypeName = "float32",
    shard_bytes: int = SHARD_BYTES,
    overrides: Fields | None = None,
) -> Path:
    """Write a checkpoint small enough for tests, its weights so large that attention matters."""
    if family not in TINY:
        raise ConfigError(f"family {family} is unknown; choose one of {', '.join(TINY)}")
    shape = {**TINY_COMMON, **TINY[family], "tie_word_embeddings": tied, **(overrides or {})}
    std = shape["hidden_size"] ** -0.5
    return _write({"model_type": family, **shape}, out, seed, dtype, std, shard_bytes)


def _write(
    fields: Fields, out: Path, seed: int, dtype: DtypeName, std: float, shard_bytes: int
) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose a new directory")
    special = write_tokenizer(out, fields["vocab_size"], fields["max_position_embeddings"])
    _write_config(fields, out, dtype, special)
    config = AutoConfig.from_pretrained(out, local_files_only=True)
    generator = torch.Generator().manual_seed(seed)
    _write_shards(out, _random_tensors(config, DTYPES[dtype], std, generator), shard_bytes)
    return out


def _write_config(fields: Fields, out: Path, dtype: DtypeName, special: SpecialIds) -> None:
    families = {family: name for name, family in ARCHITECTURES.items()}
    config = {
        "architectures": [families[fields["model_type"]]],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": special.turn_end,
        **fields,
    }
    generation = {"eos_token_id": [special.turn_end, special.text_end]}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def checkpoint_shapes(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield checkpoint names and shapes; fused experts are stored one by one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if FUSED_EXPERTS not in name:
            yield name, shape
            continue
        prefix, part = name.rsplit(".", 1)
        for expert in range(shape[0]):
            if part == "gate_up_proj":
                yield f"{prefix}.{expert}.gate_proj.weight", (shape[1] // 2, shape[2])
                yield f"{prefix}.{expert}.up_proj.weight", (shape[1] // 2, shape[2])
            else:
                yield f"{prefix}.{expert}.{part}.weight", shape[1:]


def _random_tensors(
    config: PreTrainedConfig, dtype: torch.dtype, std: float, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in checkpoint_shapes(config):
        noise = torch.empty(shape, dtype=dtype).normal_(std=std, generator=generator)
        yield name, noise + 1 if name.endswith("norm.weight") else noise


def _write_shards(out: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write one file, or numbered shards and their index; holds one shard in memory."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0
    for name, tensor in tensors:
        if pending and _nbytes(pending) + tensor.nbytes > shard_bytes:
            shards.append(_flush(out, len(shards), pending))
            pending = {}
        pending[name] = tensor
        total += tensor.nbytes
    shards.append(_flush(out, len(shards), pending))
    if len(shards) == 1:
        _part(out, 0).rename(out / SINGLE_NAME)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _part(out, number).rename(out / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _flush(out: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, _part(out, number), metadata={"format": "pt"})
    return list(tensors)


def _part(out: Path, number: int) -> Path:
    return out / f"part-{number}.safetensors"


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
