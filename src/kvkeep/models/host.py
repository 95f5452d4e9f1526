"""The transformers model: its own forward over kvkeep's leaves, a step's KV cache handed through.

transformers passes unknown arguments of a forward down to the attention modules, and asks its
registry for an attention implementation by name: nothing of it is patched.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvkeep.errors import UnsupportedModel
from kvkeep.models.attention import KVAttention
from kvkeep.models.spec import ModelSpec

ATTENTION_NAME = "kvkeep"


def refuse_attention(module: nn.Module, *_arguments: object, **_named: object) -> NoReturn:
    """Refuse to attend for a module that is not kvkeep's leaf: it has no KV cache to attend to."""
    raise UnsupportedModel(f"{type(module).__name__} attends without a kvkeep leaf")


def register_attention() -> None:
    """Make the name known to transformers; it builds no mask for names without a mask function."""
    AttentionInterface.register(ATTENTION_NAME, refuse_attention)


class HostedModel:
    """A loaded model: tokens and positions of a flattened step in, logits out."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self._model = model
        self.spec = spec

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, kv: KVAttention, rows: Tensor | None
    ) -> Tensor:
        """Return logits [len(rows), vocab] in the model's dtype; `rows` None keeps all.

        `token_ids` and `positions` are [T] int64: the step's rows, one request after the other.
        """
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if rows is None else rows,
            kv=kv,
        )
        logits: Tensor = output.logits[0]
        return logits
