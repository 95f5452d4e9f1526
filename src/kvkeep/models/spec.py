"""What the rest of kvkeep may know about a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvkeep.ops.layout import Heads


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A hosted model's shape and identity."""

    family: str
    """`model_type` of its config: llama, mistral, qwen2, qwen3 or qwen3_moe."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    """Rows of the output head; may exceed the tokenizer's vocabulary."""
    max_model_len: int
    """Positions the model has rotations for (`max_position_embeddings`)."""
    dtype: torch.dtype
    """Of activations, K and V; weights may be packed to fewer bits."""
    digest: bytes
    """32 bytes over config.json, every byte of the weight files, dtype and packing."""
    eos_token_ids: tuple[int, ...]
    num_params: int
    """Parameters of the checkpoint; tied ones count once."""
    weight_bytes: int
    """Bytes of packed weights read to compute one row (all experts counted, embedding rows not)."""

    @property
    def heads(self) -> Heads:
        """Return how a row of Q, K and V divides."""
        return Heads(self.num_heads, self.num_kv_heads, self.head_dim)
