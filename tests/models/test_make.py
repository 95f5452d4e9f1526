from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvkeep.errors import ConfigError
from kvkeep.models.check import check_config
from kvkeep.models.checkpoint import SINGLE_NAME, open_checkpoint
from kvkeep.models.make import make, tiny
from kvkeep.models.shapes import TINY
from kvkeep.models.text import TextModel


@pytest.mark.parametrize("family", sorted(TINY))
def test_tiny_checkpoints_are_whole(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(family, tmp_path / "m"))
    assert check_config(checkpoint.config) == family
    assert "lm_head.weight" not in checkpoint.tensors
    assert TextModel.load(tmp_path / "m").vocab_size == checkpoint.config["vocab_size"]


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    first, again, other = (
        load_file(tiny("qwen2", tmp_path / name, seed=seed) / SINGLE_NAME)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.slow
def test_real_shapes_with_fewer_layers(tmp_path: Path) -> None:
    path = make("qwen2.5-0.5b", tmp_path / "m", layers=1)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["num_hidden_layers"] == 1
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (151936, 896)
    assert checkpoint.tensors["model.layers.0.self_attn.k_proj.bias"].shape == (128,)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    text = TextModel.load(path)
    assert text.vocab_size == 151936
    assert text.token_text(100_000) == " word100000"
    assert text.decode(text.encode("The north door.")) == "The north door."


def test_transformers_reads_what_was_written(tmp_path: Path) -> None:
    path = tiny("qwen3_moe", tmp_path / "m", shard_bytes=100_000)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "Which door?"}]
    theirs = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert theirs == TextModel.load(path).apply_chat(chat)
    out = model.generate(torch.tensor([theirs]), max_new_tokens=4, do_sample=False)
    assert len(out[0]) <= len(theirs) + 4


@pytest.mark.parametrize(
    ("like", "layers", "says"),
    [("gpt-2", None, "--like gpt-2 is unknown"), ("qwen3-0.6b", 0, "--layers must be")],
)
def test_unknown_shapes_are_refused(
    like: str, layers: int | None, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        make(like, tmp_path / "m", layers=layers)


def test_existing_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        tiny("llama", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_family_and_small_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="family gpt is unknown"):
        tiny("gpt", tmp_path / "a")
    with pytest.raises(ConfigError, match="vocab_size must be at least"):
        tiny("llama", tmp_path / "b", overrides={"vocab_size": 100})


def test_configs_name_their_end_tokens(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "m")
    generation = json.loads((path / "generation_config.json").read_text())
    text = TextModel.load(path)
    assert generation["eos_token_id"][0] == text.eos_token_id
