"""The transformers model, attending through `kv.append` and `kv.attend` by its own registry."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvkeep.models.spec import ModelSpec

ATTENTION_NAME = "kvkeep"


class KVAttention(Protocol):
    """A step's KV cache, as the model sees it."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v [T, Hkv, D] (rotated; rows may be strided, the last dimension is dense)."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Return [T, Hq, D] for q [T, Hq, D]; the scale is 1 / sqrt(D)."""


def attend_through_kv(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    kv: KVAttention,
    **_unused: object,
) -> tuple[Tensor, None]:
    """Attend a flattened step: query [1, Hq, T, D], key and value [1, Hkv, T, D] to [1, T, Hq, D].

    The registry passes masks, scale and dropout along; which tokens a row sees is the plan's.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    kv.append(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    return kv.attend(layer, query[0].transpose(0, 1)).unsqueeze(0), None


def register_attention() -> None:
    """Make the name known to transformers; it builds no mask for names without a mask function."""
    AttentionInterface.register(ATTENTION_NAME, attend_through_kv)


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
