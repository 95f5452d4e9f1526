"""Build a transformers model without weights and graft kvkeep's leaves onto it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvkeep.errors import CheckpointError, UnsupportedModel
from kvkeep.models.attention import QKV, Geometry, SelfAttention
from kvkeep.models.host import ATTENTION_NAME, register_attention
from kvkeep.models.leaf import (
    Embedding,
    GatedMLP,
    Leaf,
    Linear,
    Packing,
    RMSNorm,
    RotaryEmbedding,
    Shape,
)
from kvkeep.models.moe import Router, SparseMLP
from kvkeep.ops.layout import Heads

HEAD_DIM_MULTIPLE = 16
HEAD_NORMS = ("q_norm", "k_norm")
GATED = ("gate_proj", "up_proj", "down_proj")


class Slot(NamedTuple):
    """One checkpoint tensor's place."""

    leaf: Leaf
    name: str
    """Below the leaf."""
    shape: Shape


def read_config(path: Path) -> PreTrainedConfig:
    """Return transformers' config of a checked directory; raises `CheckpointError`."""
    try:
        config = AutoConfig.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_cache=False,
            return_dict=True,
            output_hidden_states=False,
        )
    except (StrictDataclassError, ValueError, TypeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path / 'config.json'} is not valid: {reason}") from error
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    return config


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, packing: Packing) -> nn.Module:
    """Return the config's model with every parameter-holding module replaced by an empty leaf.

    Children are also made plain attributes, lists of them tuples: they are then found without
    `nn.Module.__getattr__`, and a forward's slice of its layers builds no new module.
    """
    register_attention()
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    model.eval()
    _graft(model, config, dtype, packing)
    for name, module in model.named_modules():
        if not isinstance(module, Leaf) and (module._parameters or module._buffers):  # noqa: SLF001
            raise UnsupportedModel(f"{type(module).__name__} at {name} has no kvkeep leaf")
        vars(module).update(
            (name, tuple(child) if isinstance(child, nn.ModuleList) else child)
            for name, child in module.named_children()
        )
    return model


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Return every checkpoint tensor the skeleton needs, by its checkpoint name."""
    return {
        f"{prefix}.{name}": Slot(leaf, name, shape)
        for prefix, leaf in leaves_of(model)
        for name, shape in leaf.shapes.items()
    }


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return D as transformers' attention modules take it."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def heads_of(config: PreTrainedConfig) -> Heads:
    """Return how a row of Q, K and V divides."""
    return Heads(config.num_attention_heads, config.num_key_value_heads, head_dim_of(config))


def leaves_of(model: nn.Module) -> Iterator[tuple[str, Leaf]]:
    """Yield leaves with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Leaf):
            yield name, module


def _graft(
    parent: nn.Module, config: PreTrainedConfig, dtype: torch.dtype, packing: Packing
) -> None:
    """Replace the parent's children by structure, or descend into them."""
    for name, child in list(parent.named_children()):
        if isinstance(child, Leaf):
            continue
        leaf = _leaf_for(child, config, dtype, packing)
        if leaf is None:
            _graft(child, config, dtype, packing)
        else:
            setattr(parent, name, leaf)


def _leaf_for(
    module: nn.Module, config: PreTrainedConfig, dtype: torch.dtype, packing: Packing
) -> nn.Module | None:
    """Return the leaf that takes a module's place; None for containers."""
    if hasattr(module, "scaling"):
        _check_attention(module, config)
        return _self_attention(module, packing)
    if isinstance(module, nn.Linear):
        return Linear(packing, _shapes(module))
    if isinstance(module, nn.Embedding):
        return Embedding(tuple(module.weight.shape))
    if hasattr(module, "variance_epsilon"):
        return RMSNorm(
            packing, _shapes(module)["weight"][0], float(_attribute(module, "variance_epsilon"))
        )
    if hasattr(module, "inv_freq"):
        return _rotary(module, config, dtype, packing.device)
    if hasattr(module, "experts") and hasattr(module, "gate"):
        return _sparse_mlp(module, packing)
    if all(isinstance(getattr(module, name, None), nn.Linear) for name in GATED):
        shapes = {name: _shapes(getattr(module, name)) for name in GATED}
        if any("bias" in shape for shape in shapes.values()):
            raise UnsupportedModel(
                "config field `mlp_bias` is set: MLPs with a bias are not supported"
            )
        inner, hidden = shapes["gate_proj"]["weight"]
        return GatedMLP(packing, hidden, inner)
    return None


def _self_attention(attention: nn.Module, packing: Packing) -> SelfAttention:
    """Return the leaf of an attention module made of four projections and perhaps head norms."""
    children = dict(attention.named_children())
    norms = tuple(name for name in HEAD_NORMS if name in children)
    unknown = sorted(children.keys() - {*QKV, "o_proj", *norms})
    if unknown or len(norms) == 1:
        name = type(attention).__name__
        raise UnsupportedModel(f"{name} has parts without a kvkeep leaf: {unknown or norms}")
    shapes = {
        f"{name}.{tensor}": shape
        for name, child in children.items()
        for tensor, shape in _shapes(child).items()
    }
    head_dim = int(_attribute(attention, "head_dim"))
    if any(shapes[f"{name}.weight"] != (head_dim,) for name in norms):
        raise UnsupportedModel("query and key norms over more than one head are not supported")
    eps = float(_attribute(children[norms[0]], "variance_epsilon")) if norms else 0.0
    layer = int(_attribute(attention, "layer_idx"))
    return SelfAttention(packing, shapes, Geometry(layer, head_dim, eps))


def _check_attention(attention: nn.Module, config: PreTrainedConfig) -> None:
    """Refuse what the kernels can't do; transformers has filled in fields the file left out."""
    scaling = float(_attribute(attention, "scaling"))
    head_dim = int(_attribute(attention, "head_dim"))
    if not math.isclose(scaling, head_dim**-0.5, rel_tol=1e-6):
        raise UnsupportedModel(f"attention scale {scaling} is not 1 / sqrt(head_dim)")
    if head_dim % HEAD_DIM_MULTIPLE:
        raise UnsupportedModel(
            f"config field `head_dim` is {head_dim}, not a multiple of {HEAD_DIM_MULTIPLE}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError("config field `num_key_value_heads` must divide num_attention_heads")


def _rotary(
    module: nn.Module, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> RotaryEmbedding:
    rope_type = str(module.rope_type)
    compute = (
        _attribute(module, "compute_default_rope_parameters")
        if rope_type == "default"
        else ROPE_INIT_FUNCTIONS[rope_type]
    )
    inv_freq, scaling = compute(config, device=torch.device("cpu"))
    longest = config.max_position_embeddings
    return RotaryEmbedding(inv_freq, float(scaling), longest, dtype, device)


def _sparse_mlp(block: nn.Module, packing: Packing) -> SparseMLP:
    gate = _attribute(block, "gate")
    num_experts, hidden = _shapes(gate)["weight"]
    router = Router(
        packing, (num_experts, hidden), int(gate.top_k), normalise=bool(gate.norm_topk_prob)
    )
    inner = int(_attribute(block, "experts").intermediate_dim)
    return SparseMLP(router, [GatedMLP(packing, hidden, inner) for _ in range(num_experts)])


def _attribute(module: nn.Module, name: str) -> Any:
    """Return what transformers keeps on its module; torch types it as a tensor or a module."""
    return getattr(module, name)


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
