from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvkeep.errors import CheckpointError, UnsupportedModel
from kvkeep.models.check import ARCHITECTURES, check_config
from kvkeep.models.shapes import LIKE

BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


@pytest.mark.parametrize("name", sorted(LIKE))
def test_known_shapes_are_supported(name: str) -> None:
    families = {family: architecture for architecture, family in ARCHITECTURES.items()}
    config = {**LIKE[name], "architectures": [families[LIKE[name]["model_type"]]]}
    assert check_config(config) == LIKE[name]["model_type"]


@pytest.mark.parametrize(
    "harmless",
    [
        {"sliding_window": 4096, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 2},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"attention_bias": True, "quantization_config": None, "pretraining_tp": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_harmless_fields_pass(harmless: dict[str, Any]) -> None:
    assert check_config({**BASE, **harmless}) == "qwen2"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
        ({**MISTRAL, "sliding_window": 4096}, "sliding_window"),
        (MISTRAL, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"is_causal": False}, "is_causal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_features_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"`{named}`"):
        check_config({**BASE, **fields})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": None}, "architectures"),
        ({"architectures": ["Qwen2ForCausalLM", "Other"]}, "architectures"),
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"head_dim": -1}, "head_dim"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_configs_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=f"`{named}`"):
        check_config({**BASE, **fields})


def test_remote_code_is_refused_before_any_model_code_is_imported(tmp_path: Path) -> None:
    config = {**BASE, "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kvkeep.errors import UnsupportedModel\n"
        "from kvkeep.models.check import check_config\n"
        "from kvkeep.models.checkpoint import read_json\n"
        "try:\n"
        f"    check_config(read_json(Path({str(tmp_path)!r}) / 'config.json'))\n"
        "except UnsupportedModel:\n"
        "    sys.exit('transformers' in sys.modules or 'torch' in sys.modules)\n"
        "sys.exit(2)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
