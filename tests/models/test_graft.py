from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from kvkeep.errors import UnsupportedModel
from kvkeep.models.graft import build_skeleton, leaves_of, slots_of
from kvkeep.models.leaf import Packing
from kvkeep.models.make import checkpoint_shapes
from kvkeep.models.shapes import TINY, TINY_COMMON
from kvkeep.ops import Ops


def config_of(model_type: str, **fields: object) -> PreTrainedConfig:
    common: dict[str, Any] = {**TINY_COMMON, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model(model_type, **{**common, **fields})


@pytest.mark.parametrize("family", sorted(TINY))
def test_leaves_keep_the_checkpoints_names_and_shapes(family: str, ops: Ops) -> None:
    config = config_of(family, **TINY[family], tie_word_embeddings=False)
    skeleton = build_skeleton(config, torch.float32, Packing(ops.leaf))
    slots = {name: slot.shape for name, slot in slots_of(skeleton).items()}
    assert slots == dict(checkpoint_shapes(config))
    assert not list(skeleton.parameters())
    assert len(dict(leaves_of(skeleton))) > 3 * 4


@pytest.mark.parametrize(
    ("model_type", "fields", "says"),
    [
        ("stablelm", {}, "LayerNorm at .* has no kvkeep leaf"),
        ("granite", {"attention_multiplier": 0.5}, "attention scale 0.5 is not"),
        ("llama", {"mlp_bias": True}, "`mlp_bias`"),
    ],
)
def test_structures_without_leaves_are_refused(
    model_type: str, fields: dict[str, object], says: str, ops: Ops
) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        build_skeleton(config_of(model_type, **fields), torch.float32, Packing(ops.leaf))
