from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from kvkeep.errors import CheckpointError, ModelNotFound, UnsupportedModel
from kvkeep.models.check import ARCHITECTURES, check_config, check_directory
from kvkeep.models.checkpoint import SINGLE_NAME
from kvkeep.models.make import tiny
from kvkeep.models.shapes import LIKE, TINY

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
        ({"mlp_only_layers": 1}, "mlp_only_layers"),
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
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
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


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"attention_bias": True},
    "one dense layer": {"mlp_only_layers": [1]},
    "every second layer sparse": {"decoder_sparse_step": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", TINY)
def test_each_tensor_of_a_whole_checkpoint_is_called_for(
    tmp_path: Path, family: str, variant: str
) -> None:
    """Transformers' own model says which tensors there are: one more or one less is a refusal."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 320, "num_experts": 2}
    path = tiny(family, tmp_path / "model", tied=False, overrides=shape | VARIANTS[variant])
    assert check_directory(path) == family
    tensors = load_file(path / SINGLE_NAME)
    for name in tensors:
        save_file({n: t for n, t in tensors.items() if n != name}, path / SINGLE_NAME)
        with pytest.raises(CheckpointError, match=f"lacks tensor {name}, "):
            check_directory(path)


def test_a_tied_head_is_not_called_for(shared: Callable[[str], Path], broken: Path) -> None:
    assert check_directory(shared("qwen2")) == "qwen2"
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
        check_directory(broken)


def test_a_directory_is_refused_by_what_is_missing_or_cut_off(broken: Path) -> None:
    weights = (broken / SINGLE_NAME).read_bytes()
    (broken / SINGLE_NAME).write_bytes(weights[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        check_directory(broken)
    (broken / SINGLE_NAME).write_bytes(weights)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        check_directory(broken)
    (broken / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        check_directory(broken)


def test_a_config_that_calls_for_endless_layers_is_refused_at_the_first(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    endless = {"num_hidden_layers": 10**12}
    (broken / "config.json").write_text(json.dumps(config | endless))
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.3\."):
        check_directory(broken)
