"""The language of the recall models: keys followed by values, amid filler.

Pairs are those of multi-query associative recall (Arora et al., 2312.04927), with labels at queries
only; filler is drawn token by token, or is one sentence over and over as RULER's haystack is
(Hsieh et al., 2404.06654). All draws come from the generator that is given.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Generator, Tensor

VOCAB: Final = 256
FIRST_KEY: Final = 64
FIRST_VALUE: Final = 160
"""Filler lies below the keys; id 0 is unused."""
SENTENCE: Final = 24
"""Tokens of the sentence that fills half of all rows."""
NOTHING: Final = -100
"""The label of a token that nobody is asked for."""


class Batch(NamedTuple):
    """Rows [B, T] and what follows each token of them."""

    ids: Tensor
    labels: Tensor


def filler(gen: Generator, rows: int, tokens: int) -> Tensor:
    """Return [rows, tokens], of each row either drawn tokens or the sentence."""
    drawn = torch.randint(1, FIRST_KEY, (rows, tokens), generator=gen)
    phase = torch.randint(SENTENCE, (rows, 1), generator=gen)
    told = 1 + (torch.arange(tokens) + phase) % SENTENCE
    return torch.where(torch.rand(rows, 1, generator=gen) < 0.5, told, drawn)


def chosen(gen: Generator, rows: int, among: int, count: int) -> Tensor:
    """Return [rows, count] different numbers below `among`."""
    return torch.rand(rows, among, generator=gen).argsort(1)[:, :count]


def repeated(gen: Generator, rows: int, tokens: int) -> Batch:
    """Return tokens that start again after a period, another in each row."""
    period = torch.randint(4, tokens // 2 + 1, (rows, 1), generator=gen)
    base = torch.randint(1, VOCAB, (rows, tokens // 2 + 1), generator=gen)
    at = torch.arange(tokens + 1)
    found = base.gather(1, at % period)
    labels = found[:, 1:].masked_fill(at[1:] < period, NOTHING)
    return Batch(found[:, :-1].contiguous(), labels)


def pairs(gen: Generator, rows: int, tokens: int, *, count: int, shown: int = 1) -> Batch:
    """Return pairs, each shown so many times in the first part, and queries in the last quarter.

    In half of the rows pairs stand mostly at the beginning.
    """
    ids = filler(gen, rows, tokens)
    labels = torch.full_like(ids, NOTHING)
    tail = max(2 * count, tokens // 4) // 2 * 2
    head = tokens - tail
    keys = chosen(gen, rows, FIRST_VALUE - FIRST_KEY, count) + FIRST_KEY
    values = torch.randint(FIRST_VALUE, VOCAB, (rows, count), generator=gen)
    early = 2.0 * (torch.rand(rows, 1, generator=gen) < 0.5)
    order = torch.rand(rows, head // 2, generator=gen) + early * torch.linspace(0, 1, head // 2)
    slots = order.argsort(1)[:, : count * shown] * 2
    ids.scatter_(1, slots, keys.repeat(1, shown))
    ids.scatter_(1, slots + 1, values.repeat(1, shown))
    asked = torch.randint(count, (rows, count), generator=gen)
    at = head + chosen(gen, rows, tail // 2, count) * 2
    ids.scatter_(1, at, keys.gather(1, asked))
    ids.scatter_(1, at + 1, values.gather(1, asked))
    labels.scatter_(1, at, values.gather(1, asked))
    return Batch(ids, labels)


def spans(gen: Generator, rows: int, tokens: int, *, length: int) -> Batch:
    """Return a segment of different tokens in the first part, and half of it again in the last."""
    ids = filler(gen, rows, tokens)
    labels = torch.full_like(ids, NOTHING)
    part, tail = length // 2, max(length, tokens // 4)
    head = tokens - tail
    segment = chosen(gen, rows, VOCAB - FIRST_KEY, length) + FIRST_KEY
    begin = torch.randint(head - length + 1, (rows, 1), generator=gen)
    ids.scatter_(1, begin + torch.arange(length), segment)
    first = torch.randint(length - part + 1, (rows, 1), generator=gen)
    again = segment.gather(1, first + torch.arange(part))
    at = head + torch.randint(tail - part + 1, (rows, 1), generator=gen) + torch.arange(part)
    ids.scatter_(1, at, again)
    labels.scatter_(1, at[:, :-1], again[:, 1:])
    return Batch(ids, labels)


def drawn(gen: Generator, kind: str, rows: int, tokens: int) -> Batch:
    """Return rows of a kind: `repeated`, `pairs`, `shots` (pairs shown three times) or `spans`."""
    count = max(3, tokens // 40)
    if kind == "repeated":
        return repeated(gen, rows, tokens)
    if kind == "pairs":
        return pairs(gen, rows, tokens, count=count)
    if kind == "shots":
        return pairs(gen, rows, tokens, count=max(2, count // 2), shown=3)
    return spans(gen, rows, tokens, length=min(48, tokens // 4))
