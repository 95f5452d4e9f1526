"""Python's documentation as training text, and the byte-level BPE tokenizer trained on it."""

from __future__ import annotations

import ast
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model import data
from tools.demo_model.words import CITY_ENDS, CITY_STARTS

VOCAB = 2048
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idle_test", "__pycache__"}


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of more than 60 characters of one module; none of a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 60:
                yield text


def prose(text: str) -> str:
    """The plain English paragraphs of a text, one line each: code, tables and non-ASCII go."""
    kept = [
        paragraph
        for paragraph in text.split("\n\n")
        if sum(c.isalpha() or c == " " for c in paragraph) > 0.85 * len(paragraph)
        and ">>>" not in paragraph
        and paragraph.isascii()
    ]
    return "\n\n".join(re.sub(r"[ \t]*\n[ \t]*(?![-*\d])", " ", p).strip() for p in kept)


def collect(root: Path) -> list[str]:
    """Prose of all docstrings under `root` and of Python's own reference topics."""
    texts: dict[str, None] = {}
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py") and name != "topics.py":
                texts.update(dict.fromkeys(docstrings(Path(folder, name))))
    for topic in topics.values():
        without_rules = re.sub(r"\n[*=\-~^]{4,}\n", "\n", topic)
        texts.update(dict.fromkeys(t for t in without_rules.split("\n\n\n") if len(t) > 60))
    return [p for p in map(prose, texts) if len(p) > 60]


def corpus(seed: int) -> list[str]:
    """The training text of the running Python, shuffled."""
    texts = collect(Path(sysconfig.get_paths()["stdlib"]))
    random.Random(seed).shuffle(texts)
    return texts


def build(texts: list[str], seed: int, vocab: int = VOCAB) -> Tokenizer:
    """A tokenizer with single digits whose merges cover the words of the samples."""
    rng = random.Random(seed)
    made = [data.recall_text(rng, 6, data.no_filler, False) for _ in range(2000)]
    made += [data.render(data.chat_turns(rng, 6, data.no_filler, False)) for _ in range(1000)]
    made += [data.table_text(rng, 10, False) for _ in range(500)]
    words = ["".join(p.text for p in pieces) for pieces in made]
    for special in data.SPECIALS:
        words = [w.replace(special, "\n") for w in words]
    words += ["\n".join(start + end for end in CITY_ENDS) for start in CITY_STARTS] * 60
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(data.SPECIALS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator(texts + words, trainer)
    return tok
