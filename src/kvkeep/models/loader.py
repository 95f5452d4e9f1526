"""Load a checkpoint: tensors streamed one by one through the folds into packed leaves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvkeep.errors import CheckpointError, UnsupportedModel
from kvkeep.models.check import check_config
from kvkeep.models.checkpoint import DTYPE_BYTES, Checkpoint, open_checkpoint
from kvkeep.models.graft import (
    Slot,
    build_skeleton,
    head_dim_of,
    heads_of,
    leaves_of,
    read_config,
    slots_of,
)
from kvkeep.models.host import HostedModel
from kvkeep.models.leaf import Packing
from kvkeep.models.memory import check_fits, free_on
from kvkeep.models.shards import PlainShard, Shard
from kvkeep.models.spec import ModelSpec
from kvkeep.ops.layout import Heads, Ops, WeightFold
from kvkeep.shield.folder import Unwrap

DtypeName = Literal["auto", "bfloat16", "float32"]
WeightFormat = Literal["float", "int8"]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""
FoldsOf = Callable[[Heads], Sequence[WeightFold]]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
MAX_NAMED = 3
"""Missing or unexpected tensors named in an error."""


def load(
    path: Path,
    *,
    ops: Ops,
    dtype: DtypeName = "auto",
    weights: WeightFormat = "float",
    folds: FoldsOf = lambda _: (),
    progress: Progress | None = None,
    unwrap: Unwrap | None = None,
) -> HostedModel:
    """Return the hosted model of a checkpoint directory; raises `ModelError` with one sentence.

    `folds` is asked once, what changes of weights a model with such heads is to be loaded with;
    `unwrap` for the key of a sealed checkpoint.
    """
    checkpoint = open_checkpoint(path, unwrap)
    check_config(checkpoint.config)
    model_dtype = _choose_dtype(checkpoint, dtype)
    config = read_config(path)
    packing = Packing(ops.leaf, int8=weights == "int8", device=ops.device)
    skeleton = build_skeleton(config, model_dtype, packing)
    slots = slots_of(skeleton)
    tied = _tied(checkpoint)
    _check_names(checkpoint, slots, tied=tied)
    check_fits(
        checkpoint,
        free_on(ops.device),
        embedding=EMBEDDING,
        tied=tied,
        element_bytes=model_dtype.itemsize,
        packed_bytes=1 if weights == "int8" else model_dtype.itemsize,
    )
    chosen = folds(heads_of(config))
    _fill(checkpoint, slots, (model_dtype, ops.device), chosen, progress, tied=tied)
    return HostedModel(skeleton, _describe(checkpoint, config, model_dtype, weights, skeleton))


def _choose_dtype(checkpoint: Checkpoint, wanted: DtypeName) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    config = checkpoint.config
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        stored = checkpoint.tensors.get(EMBEDDING)
        name = "bfloat16" if stored is None else STORED_DTYPES[stored.dtype]
    if name not in DTYPES:
        raise UnsupportedModel(
            f"config field `dtype` is {name!r}; choose bfloat16 or float32 with --dtype"
        )
    return DTYPES[name]


def _tied(checkpoint: Checkpoint) -> bool:
    """Return whether the head is the embedding; a head of its own in the files comes first."""
    return bool(checkpoint.config.get("tie_word_embeddings")) and HEAD not in checkpoint.tensors


def _check_names(checkpoint: Checkpoint, slots: Mapping[str, Slot], *, tied: bool) -> None:
    stored = checkpoint.tensors
    needed = set(slots) - ({HEAD} if tied else set())
    if missing := sorted(needed - set(stored)):
        raise CheckpointError(f"{checkpoint.path} lacks {_named(missing)}")
    if unexpected := sorted(name for name in set(stored) - needed if not _derived(name)):
        raise CheckpointError(
            f"{checkpoint.path} holds {_named(unexpected)}, which config.json does not call for"
        )
    for name in sorted(needed):
        if stored[name].shape != slots[name].shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(stored[name].shape)}; "
                f"config.json says {list(slots[name].shape)}"
            )


def _derived(name: str) -> bool:
    """Return whether a tensor is computed from the config; old exporters stored those too."""
    return name.endswith("rotary_emb.inv_freq")


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"tensor {', '.join(names[:MAX_NAMED])}{more}"


def _fill(
    checkpoint: Checkpoint,
    slots: Mapping[str, Slot],
    to: tuple[torch.dtype, torch.device],
    folds: Sequence[WeightFold],
    progress: Progress | None,
    *,
    tied: bool,
) -> None:
    """Stream every tensor into its leaf; at most one leaf's originals are held at a time."""
    total = sum(_stored_bytes(checkpoint, name) for name in checkpoint.tensors)
    done = 0
    for name, stored in _stream(checkpoint):
        done += _stored_bytes(checkpoint, name)
        if name in slots:
            _put(slots[name], name, stored, to, folds)
        if name == EMBEDDING and tied:
            _put(slots[HEAD], HEAD, stored, to, folds)
        if progress is not None:
            progress(done, total)


def _put(
    slot: Slot,
    name: str,
    tensor: Tensor,
    to: tuple[torch.dtype, torch.device],
    folds: Sequence[WeightFold],
) -> None:
    dtype, device = to
    tensor = tensor.to(dtype)
    for fold in folds:
        tensor = fold.apply(name, tensor)
    slot.leaf.fill(slot.name, tensor.to(device))


def _stream(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for shard in checkpoint.shards:
        yield from _mapped(shard) if isinstance(shard, PlainShard) else _read(shard, checkpoint)


def _mapped(shard: PlainShard) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(shard.file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - a handle, no mapping
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard.file} can't be read: {error}") from error


def _read(shard: Shard, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield a sealed file's tensors, each opened into memory of its own."""
    for name, stored in checkpoint.tensors.items():
        if stored.file == shard.file:
            raw = shard.read(stored.begin, _stored_bytes(checkpoint, name))
            dtype = getattr(torch, STORED_DTYPES[stored.dtype])
            flat = torch.frombuffer(raw, dtype=dtype) if len(raw) else torch.empty(0, dtype=dtype)
            yield name, flat.reshape(stored.shape)


def _stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    stored = checkpoint.tensors[name]
    return math.prod(stored.shape) * DTYPE_BYTES[stored.dtype]


def _describe(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    weights: WeightFormat,
    skeleton: nn.Module,
) -> ModelSpec:
    identity = hashlib.sha256(checkpoint.digest())
    identity.update(f"{dtype}/{weights}".encode())
    return ModelSpec(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        dtype=dtype,
        digest=identity.digest(),
        eos_token_ids=_eos_token_ids(checkpoint),
        num_params=sum(math.prod(stored.shape) for stored in checkpoint.tensors.values()),
        weight_bytes=sum(leaf.read_bytes for _, leaf in leaves_of(skeleton)),
    )


def _eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    value = checkpoint.generation.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError("field `eos_token_id` must be an integer or a list of integers")
    return tuple(ids)
