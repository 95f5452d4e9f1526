"""A working tokenizer of any size for random checkpoints: bytes, a few merges, numbered words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from kvkeep.errors import ConfigError

TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (TEXT_END, TURN_START, TURN_END)
MAX_TRAINED = 2_000
MIN_VOCAB = 256 + len(SPECIAL)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

SAMPLE = """\
The keeper of the house keeps a key for every door and a page for every guest. When a guest
comes back, the keeper opens the page that was kept, reads it from the first line to the last,
and goes on where the talk had ended. A page that was written by one guest is never shown to
another. What is the number on the north door? The number on the north door is 4821. What is the
colour of the roof? The roof of the old house is red, and the roof of the new house is blue.
One, two, three, four, five, six, seven, eight, nine, ten. You are a helpful assistant. Answer
in one sentence. def main() -> None: return [value for value in values if value > 0]
"""


class SpecialIds(NamedTuple):
    """Ids of the tokens that end a text and a turn."""

    text_end: int
    turn_end: int


def write_tokenizer(out: Path, vocab_size: int, max_length: int) -> SpecialIds:
    """Write a tokenizer and a chat template; every id below `vocab_size` decodes to text."""
    if vocab_size < MIN_VOCAB:
        raise ConfigError(f"vocab_size must be at least {MIN_VOCAB}")
    tokenizer = _train(min(MAX_TRAINED, vocab_size - len(SPECIAL)))
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for number in range(len(vocab), vocab_size - len(SPECIAL)):
        vocab[f"Ġword{number}"] = number
    padded = Tokenizer.from_str(json.dumps(state))
    padded.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    padded.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": TEXT_END,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return SpecialIds(vocab_size - len(SPECIAL), vocab_size - 1)


def _train(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    return tokenizer
