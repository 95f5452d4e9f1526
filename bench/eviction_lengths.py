"""How long contexts may be: what models answer with all tokens, beyond the suite's lengths.

No policy is judged where a model does not answer in the first place. Contexts are those of a
development seed, of kinds that can be made longer. `python -m bench.eviction_lengths`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import numpy as np
import torch

from bench import eviction_suite
from bench.eviction_policies import everything
from bench.eviction_suite import Suite
from bench.eviction_tally import World, gathered, items_of, worlds
from bench.harness import Cell
from bench.quality_suite import Part
from kvkeep import ops
from kvkeep.cli.console import OUT, make_table

LENGTHS: Final = (896, 1536, 2048, 3072, 3840)
"""Both models have 4,096 positions: the last leaves room for a question and its answer."""
CONTEXTS: Final = 8
"""Of a kind and length."""
FACTS: Final = 24
PAIRS: Final = (("needle", 4, 4), ("mqar", 20, 8), ("values", 8, 6), ("copy", 48, 6))


def of_length(suite: Suite, tokens: int, count: int) -> Suite:
    """Return a suite of contexts of one length, for text and for ids."""
    told = [Part(kind="facts", tokens=tokens, facts=FACTS, count=count, quick=0, asked=6)]
    told.append(Part(kind="chat", tokens=tokens, facts=FACTS, count=count, quick=0, asked=7))
    pairs = [
        Part(kind=kind, tokens=tokens, facts=facts, count=count, quick=0, asked=asked)
        for kind, facts, asked in PAIRS
    ]
    return msgspec.structs.replace(suite, text=tuple(told), recall=tuple(pairs))


def rows(lengths: Sequence[int], count: int) -> Iterator[dict[str, Cell]]:
    """Yield what each model answers of each task at each length."""
    suite = eviction_suite.read()
    kernels = ops.select("auto", torch.get_num_threads(), "cpu")
    for tokens in lengths:
        yield from answered(worlds(kernels, None, of_length(suite, tokens, count)), tokens)


def answered(models: Sequence[World], tokens: int) -> Iterator[dict[str, Cell]]:
    """Yield the tasks of one length."""
    seed = eviction_suite.read().development[0]
    found = gathered("after", models, {"full": everything}, seeds=(seed,), quick=False, twice=False)
    items = items_of(found, "full")
    for task in sorted({item.task for item in items}):
        own = [item.score for item in items if item.task == task]
        yield {"tokens": tokens, "task": task, "items": len(own), "full": float(np.mean(own))}


def main(arguments: Sequence[str]) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--contexts", type=int, default=CONTEXTS)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    told = list(rows(given.lengths, given.contexts))
    cells = [[row["tokens"], row["task"], row["items"], f"{row['full']:.3f}"] for row in told]
    OUT.print(make_table(("tokens", "task", "items", "right"), cells))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
