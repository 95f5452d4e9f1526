"""The finished model in the Hugging Face layout: weights in bf16, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tools.demo_model import data
from tools.demo_model.model import Llama, Shape

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def config(shape: Shape) -> LlamaConfig:
    """The shape in transformers' words."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.inner,
        hidden_act="silu",
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_id=data.SPECIALS.index(data.END),
        pad_token_id=data.SPECIALS.index(data.END_OF_TEXT),
    )


def export(net: Llama, tok: Tokenizer, folder: Path) -> None:
    """Write config, weights, tokenizer, template and generation settings to `folder`."""
    model = LlamaForCausalLM(config(net.shape))
    missing = model.load_state_dict(net.state_dict(), strict=False)
    if missing.unexpected_keys or missing.missing_keys != ["lm_head.weight"]:
        raise ValueError(f"the network does not fit LlamaForCausalLM: {missing}")
    model.tie_weights()
    ends = [data.SPECIALS.index(data.END), data.SPECIALS.index(data.END_OF_TEXT)]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[1], do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone
    wrap(tok, net.shape.positions).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    named.pop("backend", None)  # older releases of transformers know neither
    settings.write_text(json.dumps(named, indent=2) + "\n")


def wrap(tok: Tokenizer, positions: int) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token=data.END,
        pad_token=data.END_OF_TEXT,
        additional_special_tokens=list(data.SPECIALS[1:4]),
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
