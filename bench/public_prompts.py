"""Prompts that a service might publish: system prompts and tool schemas with sample data."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

ROOT: Final = Path(__file__).parents[1]
PARTS: Final = ROOT / "bench" / "data" / "public_prompts.toml"
DEMO_TOKENIZER: Final = ROOT / "src" / "kvkeep" / "demo" / "tokenizer.json"
PROMPT_TOKENS: Final = 4096
SEED: Final = 11


def public_prompts(count: int, path: Path = PARTS) -> list[str]:
    """Return prompts of `PROMPT_TOKENS` tokens of the demo model's tokenizer, of a file's parts."""
    parts = tomllib.loads(path.read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(DEMO_TOKENIZER))
    found = []
    for index in range(count):
        rng = random.Random(f"{SEED}/{index}")
        pieces = [*parts["tools"], *parts["notes"]]
        rng.shuffle(pieces)
        text = "\n\n".join([parts["heads"][index % len(parts["heads"])], *pieces])
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        while len(ids) < PROMPT_TOKENS:
            rng.shuffle(pieces)
            text = "\n\n".join([text, *pieces])
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        found.append(tokenizer.decode(ids[:PROMPT_TOKENS], skip_special_tokens=False))
    return found
