"""The model card, and held-out conversations to try the model with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tools.demo_model.evaluate import Checkpoint, Score, Scores, conversations
from tools.demo_model.samples import Corpus, Sampler

TRIALS = {256: 8, 1024: 8, 2048: 8}
TRIAL_SEED = 4321

TASKS = {
    "recall": "questions in plain text",
    "chat": "questions through the chat template",
    "chat_generated": "the same, written by `generate` turn after turn",
    "chat_crowded": "chat, six facts in ten about the same few people and places",
    "table": "table look-up in plain text",
    "table_chat": "table look-up through the chat template",
    "copying": "copying, per token (alphabets of 8 and more)",
    "copying_256": "copying, per token (alphabets of 256 and more)",
}

HEAD = """---
license: psf-2.0
language: en
pipeline_tag: text-generation
---
# kvkeep demo model

A Llama-like model of {parameters:,} parameters (4 layers, width 256, 4 query and 2 KV heads of 64,
tied embeddings, byte-level BPE of 2,048 tokens with single digits) that answers questions about
facts in its context. It exists to show damage: an answer depends on a few tokens far back, so a
wrong page, a lost page or a bad code shows as a wrong answer. It knows nothing else, and its
English is poor.

Made by `python tools/train_demo.py --out DIR`, seed {seed}, on {tokens:.1f} M tokens.

## Use

As the template renders it, but for the line breaks:

```
{example}
```

Conversations may hold the facts in the system message or in a user message; one question per
user message, and the answer is the bare value followed by `<|end|>`. `heldout.jsonl` has
{trials} conversations with the right answers, none of whose entities or codes were trained on.
The tokenizer adds no tokens of its own, and the template renders a history as a prefix of every
longer history. Contexts of up to 2,048 tokens were trained and measured.

## Scores

Exact match in bf16 with transformers, percent +- binomial standard error (answers), held-out
entities and codes; 4-6 facts at 256 tokens, 8-10 at 512, 8-24 at 1,024 and 2,048.

"""

TAIL = """
Held-out documentation: {nats:.2f} nats per token, {bits:.2f} bits per byte ({text_tokens} tokens).

## Training text and licence

The docstrings of the standard library and the reference topics of Python {version} (Copyright
Python Software Foundation, PSF licence 2), filtered to plain paragraphs and learnt beside generated
samples: facts with questions, conversations, tables, copying. Weights and tokenizer are
distributed under the same terms as kvkeep; the documentation they learnt from remains under the
PSF licence.
"""

EXAMPLE = """<|system|>The access code of the north gate is 4821. The gate is old.<|end|>
<|user|>What is the access code of the north gate?<|end|>
<|assistant|>4821<|end|>"""


def cell(score: Score) -> str:
    """A share with its error."""
    return f"{100 * score.share:.1f} +- {100 * score.error:.1f} (n={score.asked})"


def table(scores: Scores) -> str:
    """The scores, a row per task."""
    lengths = sorted(scores.tasks)
    lines = ["| task | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for name, title in TASKS.items():
        cells = [cell(scores.tasks[n][name]) for n in lengths]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, scores: Scores, seed: int, tokens: int) -> None:
    """Write README.md beside the checkpoint."""
    parameters = sum(p.numel() for p in Checkpoint.load(folder).model.parameters())
    head = HEAD.format(
        parameters=parameters,
        seed=seed,
        tokens=tokens / 1e6,
        example=EXAMPLE,
        trials=sum(TRIALS.values()),
    )
    tail = TAIL.format(
        nats=scores.text.nats_per_token,
        bits=scores.text.bits_per_byte,
        text_tokens=scores.text.tokens,
        version=".".join(map(str, sys.version_info[:3])),
    )
    (folder / "README.md").write_text(head + table(scores) + tail)


def write_trials(folder: Path, corpus: Corpus) -> None:
    """Write heldout.jsonl: conversations with the true answers and their length in tokens."""
    tok = Checkpoint.load(folder).tok
    lines = []
    for length, count in TRIALS.items():
        sampler = Sampler(corpus, TRIAL_SEED, length)
        for messages in conversations(tok, sampler, length, count):
            size = len(tok.apply_chat_template(messages, return_dict=False))
            lines.append(json.dumps({"tokens": size, "messages": messages}))
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n")
