"""The trace of `kvkeep bench sharing`: who asks for which template, when, with how long a suffix.

`bench/traces/sharing.json` is what `python -m bench.sharing_trace` writes; it holds no prompt.
Templates are the public prompts of `bench/public_prompts.py`, suffixes are words by chance.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from bench.public_prompts import public_prompts
from kvkeep.audit.prompts import WORDS
from kvkeep.models.text import TextModel

FILE: Final = Path(__file__).parent / "traces" / "sharing.json"
PAGE: Final = 64
K: Final = 4
"""Voters besides the reader that make a page public."""
MEASURED_FROM: Final = 3
"""The first epoch whose requests count."""
BESIDE: Final = 16
"""Tokens behind a declared template: where a text is cut, its last ones are other tokens."""
POOL_SHARE: Final = 0.3
"""Of what isolation would hold at the end."""


class Ask(NamedTuple):
    """One request."""

    epoch: int
    tenant: int
    template: int
    suffix_tokens: int


@dataclass(frozen=True, slots=True)
class Shape:
    """How big a trace is."""

    tenants: int = 32
    templates: int = 8
    template_tokens: int = 2048
    suffix_tokens: tuple[int, int] = (64, 512)
    answer_tokens: int = 64
    epochs: int = 5
    requests_per_epoch: int = 96

    @property
    def longest(self) -> int:
        """Return the tokens of the longest request with its answer."""
        return self.template_tokens + self.suffix_tokens[1] + self.answer_tokens


FULL: Final = Shape()
QUICK: Final = Shape(
    tenants=8,
    templates=2,
    template_tokens=512,
    suffix_tokens=(64, 128),
    answer_tokens=8,
    epochs=3,
    requests_per_epoch=12,
)


def make(shape: Shape, seed: int = 0) -> list[Ask]:
    """Return requests by Zipf(1) over templates; in epoch 1 each goes out by K + 1 tenants."""
    chance = random.Random(seed)
    weights = [1 / rank for rank in range(1, shape.templates + 1)]
    found: list[Ask] = []
    for epoch in range(1, shape.epochs + 1):
        pairs: list[tuple[int, int]] = []
        if epoch == 1:
            for template in range(shape.templates):
                voters = chance.sample(range(shape.tenants), K + 1)
                pairs += [(tenant, template) for tenant in voters]
        while len(pairs) < shape.requests_per_epoch:
            (template,) = chance.choices(range(shape.templates), weights)
            pairs.append((chance.randrange(shape.tenants), template))
        chance.shuffle(pairs)
        found += [Ask(epoch, t, p, chance.randint(*shape.suffix_tokens)) for t, p in pairs]
    return found


def read() -> list[Ask]:
    """Return the committed trace."""
    return [Ask(*row) for row in json.loads(FILE.read_text(encoding="utf-8"))]


def isolation_pages(trace: Sequence[Ask], shape: Shape) -> int:
    """Return the pages that tenants hold at the end where nothing is shared and nothing evicted."""
    held = {(ask.tenant, ask.template) for ask in trace}
    own = sum(-(-(ask.suffix_tokens + shape.answer_tokens) // PAGE) for ask in trace)
    return len(held) * (shape.template_tokens // PAGE) + own


def least_pages(shape: Shape) -> int:
    """Return the pages without which some tenant could not send one request."""
    return shape.tenants * (-(-shape.longest // PAGE) + 2)


def pool_pages(trace: Sequence[Ask], shape: Shape) -> int:
    """Return the pages that every engine is given."""
    return max(int(POOL_SHARE * isolation_pages(trace, shape)), least_pages(shape))


class Texts:
    """Makes the token ids of requests."""

    def __init__(self, text: TextModel, shape: Shape) -> None:
        self._text = text
        self._shape = shape
        whole = [
            text.encode(prompt, add_special_tokens=False)
            for prompt in public_prompts(shape.templates)
        ]
        self._templates = [ids[: shape.template_tokens] for ids in whole]
        self.declared = [text.decode(ids[: shape.template_tokens + BESIDE]) for ids in whole]
        """What an operator declares public: each template, and what a page has no room for."""

    def prompt(self, number: int, ask: Ask) -> list[int]:
        """Return the ids of the trace's request of this number."""
        return self._templates[ask.template] + self._ids(f"suffix {number}", ask.suffix_tokens)

    def _ids(self, seed: str, tokens: int) -> list[int]:
        words = random.Random(seed).choices(WORDS, k=tokens)
        return self._text.encode(" ".join(words), add_special_tokens=False)[:tokens]


def main() -> int:
    """Write the committed trace."""
    FILE.parent.mkdir(exist_ok=True)
    rows = ",\n".join(json.dumps(list(ask), separators=(",", ":")) for ask in make(FULL))
    FILE.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
