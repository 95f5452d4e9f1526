"""Refuse what kvkeep can't serve, by name, before model code is imported or a process started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvkeep.errors import CheckpointError, UnsupportedModel
from kvkeep.models.checkpoint import Json, open_checkpoint, read_json
from kvkeep.models.shards import check_sealed
from kvkeep.shield.folder import is_sealed

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not change with the length of a request."""
FULL = {"full_attention"}
MISTRAL_DEFAULT_WINDOW = 4096
"""What transformers reads where a Mistral config leaves `sliding_window` out."""

REQUIRED_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL_SIZES = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "decoder_sparse_step",
)
REFUSED_WHEN_SET = {
    "auto_map": "remote code is never run",
    "quantization_config": "quantised checkpoints are not supported; use the 16-bit or float32 one",
    "compression_config": "quantised checkpoints are not supported; use the 16-bit or float32 one",
    "kv_lora_rank": "latent attention (MLA) is not supported",
    "q_lora_rank": "latent attention (MLA) is not supported",
    "attn_logit_softcapping": "soft-capped attention is not supported",
    "final_logit_softcapping": "soft-capped logits are not supported",
    "attention_chunk_size": "chunked attention is not supported",
    "mlp_bias": "MLPs with a bias are not supported",
    "is_encoder_decoder": "only decoders are supported",
    "use_sliding_window": "sliding-window attention is not supported",
}

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
WITH_ATTENTION_BIAS = ("llama", "qwen3", "qwen3_moe")
"""Families whose `attention_bias` gives every projection a bias; qwen2's are always there."""


def check_directory(path: Path) -> str:
    """Return the family of a checkpoint directory that looks whole; raises `ModelError`.

    Reads the config and the weight files' headers alone: what only the model's code can tell, such
    as shapes, is left to the loader.
    """
    family = _check_sealed(path) if is_sealed(path) else _check_open(path)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path} has no tokenizer.json; no other tokenizer is supported")
    return family


def _check_open(path: Path) -> str:
    checkpoint = open_checkpoint(path)
    family = check_config(checkpoint.config)
    for name in _needed(checkpoint.config, family):
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{path} lacks tensor {name}, which config.json calls for")
    return family


def _check_sealed(path: Path) -> str:
    """Return the family that a sealed checkpoint says it is of; its weights stay shut."""
    check_sealed(path)
    return check_config(read_json(path / "config.json"))


def check_config(config: Json) -> str:
    """Return the config's family; raises `UnsupportedModel` or `CheckpointError`."""
    for field, why in REFUSED_WHEN_SET.items():
        if config.get(field):
            raise UnsupportedModel(f"config field `{field}` is set: {why}")
    family = _family(config)
    _check_sizes(config)
    for field, why in _refusals(config, family):
        raise UnsupportedModel(f"config field `{field}` {why}")
    _check_rope(config)
    return family


def _needed(config: Json, family: str) -> Iterator[str]:
    """Yield the names of the tensors that a checked config calls for."""
    yield "model.embed_tokens.weight"
    for layer in range(config["num_hidden_layers"]):
        for name in (*_attention(config, family), *_mlp(config, family, layer)):
            yield f"model.layers.{layer}.{name}"
    yield "model.norm.weight"
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight"


def _attention(config: Json, family: str) -> Iterator[str]:
    yield from (f"self_attn.{name}.weight" for name in ATTENTION)
    if family == "qwen2":
        yield from (f"self_attn.{name}.bias" for name in ATTENTION[:3])
    elif family in WITH_ATTENTION_BIAS and config.get("attention_bias"):
        yield from (f"self_attn.{name}.bias" for name in ATTENTION)
    if family.startswith("qwen3"):
        yield from ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    yield from ("input_layernorm.weight", "post_attention_layernorm.weight")


def _mlp(config: Json, family: str, layer: int) -> Iterator[str]:
    """Yield a layer's MLP, or its router and as many experts as the config names."""
    dense, step = config.get("mlp_only_layers"), config.get("decoder_sparse_step") or 1
    if family != "qwen3_moe" or layer in (dense or ()) or (layer + 1) % step:
        yield from (f"mlp.{name}.weight" for name in MLP)
        return
    yield "mlp.gate.weight"
    for expert in range(config.get("num_experts") or 0):
        yield from (f"mlp.experts.{expert}.{name}.weight" for name in MLP)


def _family(config: Json) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise CheckpointError("config field `architectures` must name exactly one architecture")
    family = ARCHITECTURES.get(str(architectures[0]))
    if family is None:
        supported = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(
            f"config field `architectures` names {architectures[0]}; supported are {supported}"
        )
    if config.get("model_type") != family:
        raise CheckpointError(
            f"config field `model_type` is {config.get('model_type')!r}; "
            f"{architectures[0]} needs {family!r}"
        )
    return family


def _check_sizes(config: Json) -> None:
    for field in (*REQUIRED_SIZES, *OPTIONAL_SIZES):
        value = config.get(field)
        if value is None and field not in REQUIRED_SIZES:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config field `{field}` must be a positive integer")


def _refusals(config: Json, family: str) -> Iterator[tuple[str, str]]:
    """Yield (field, why) for values outside the supported set."""
    if family == "mistral" and config.get("sliding_window", MISTRAL_DEFAULT_WINDOW) is not None:
        yield "sliding_window", "is not null: sliding-window attention is not supported"
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(map(str, kinds)) != FULL):
        yield "layer_types", "names layers other than full_attention"
    if not isinstance(config.get("mlp_only_layers") or [], list):
        yield "mlp_only_layers", "is not a list of layers"
    if config.get("pretraining_tp", 1) not in (None, 1):
        yield "pretraining_tp", "is not 1: split linear layers are not supported"
    if config.get("hidden_act", "silu") != "silu":
        yield "hidden_act", f"is {config['hidden_act']!r}; only 'silu' is supported"
    if config.get("is_causal", True) is not True:
        yield "is_causal", "is not true: only causal attention is supported"


def _check_rope(config: Json) -> None:
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"config field `{field}` must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise UnsupportedModel(
                f"config field `{field}` has type {kind!r}; supported are {', '.join(ROPE_TYPES)}"
            )
        if rope.get("partial_rotary_factor", 1) != 1:
            raise UnsupportedModel(f"config field `{field}` rotates only part of a head")
    if config.get("partial_rotary_factor", 1) not in (None, 1):
        raise UnsupportedModel("config field `partial_rotary_factor` rotates only part of a head")
