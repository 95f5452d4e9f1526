"""A suite answered over a dense KV cache in plain torch, part of its tokens masked by policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from bench.eviction_policies import Masks
from bench.eviction_reader import Reader
from bench.quality_run import Item
from bench.quality_suite import Context, Probe

EACH: Final = 2
"""Questions of a task and context where each costs a prompt, or text of its own."""


class Outcome(NamedTuple):
    """What a policy kept of one context, and what was answered."""

    policy: str
    kept: Tensor
    """[L, Hkv] share at the prompt's end."""
    live_tokens: float
    """Over all rows after prompts' ends, those attended to: a mean over layers and heads."""
    seen_tokens: float
    """Over the same rows, all before them."""
    prompt_tokens: float
    """Over prompts' own rows, all before them; prompts are computed whole."""
    items: list[Item]


def after(
    reader: Reader,
    contexts: Sequence[Context],
    policies: Mapping[str, Masks],
    *,
    twice: bool,
    each: int | None = None,
) -> Iterator[Outcome]:
    """Yield each policy's outcome per context: questions come once it is compressed.

    `each`: so many of a task; None: all.
    """
    for i, context in enumerate(contexts):
        cache, seen = reader.see(context.ids, twice=twice)
        live = torch.stack([policy(seen) for policy in policies.values()])
        groups: dict[tuple[int, int], list[Probe]] = {}
        for probe in first(context.probes, each):
            groups.setdefault((len(probe.ids), reader.steps(probe)), []).append(probe)
        found: list[list[Item]] = [[] for _ in policies]
        rows = []
        for (length, steps), probes in groups.items():
            scores = reader.ask(cache, live, probes, [probe.ids for probe in probes])
            rows += [length + steps - 1] * len(probes)
            for own, told in zip(found, scores, strict=True):
                own += [Item(p.task, i, score) for p, score in zip(probes, told, strict=True)]
        for name, own, items in zip(policies, live, found, strict=True):
            yield _outcome(name, own, cache.tokens, rows, items)


def before(
    reader: Reader,
    contexts: Sequence[Context],
    policies: Mapping[str, Masks],
    *,
    twice: bool,
    each: int | None = EACH,
) -> Iterator[Outcome]:
    """Yield the same for questions that stand in the prompt; each is a prompt of its own.

    An answer's first token comes from the prompt's last row, which saw everything. So answers of
    one token are left out, and of others where single tokens count the first does not.
    """
    for i, context in enumerate(contexts):
        long = [probe for probe in context.probes if reader.length(probe) > 1]
        if not long:
            continue
        cache, seen = reader.see(context.ids, twice=twice)
        for probe in first(long, each or EACH):
            asked, known = reader.see_more(cache, seen, probe.ids)
            live = torch.stack([policy(known) for policy in policies.values()])
            scores = reader.go_on(asked, live, probe, int(known.logits.argmax()))
            for name, own, score in zip(policies, live, scores, strict=True):
                items = [Item(probe.task, i, score)]
                yield _outcome(name, own, asked.tokens, [reader.steps(probe) - 1], items)


def first(probes: Sequence[Probe], each: int | None) -> list[Probe]:
    """Return the first so many of each task; None: all."""
    found: dict[str, list[Probe]] = {}
    for probe in probes:
        found.setdefault(probe.task, []).append(probe)
    return [probe for own in found.values() for probe in own[:each]]


def _outcome(
    name: str, live: Tensor, prompt: int, rows: Sequence[int], items: list[Item]
) -> Outcome:
    kept = live.float().mean(-1)
    more = sum(count * (count + 1) / 2 for count in rows)
    each = prompt * sum(rows)
    whole = len(rows) * prompt * (prompt + 1) / 2
    return Outcome(name, kept, float(kept.mean()) * each + more, each + more, whole, items)


Protocol = Callable[..., Iterator[Outcome]]
PROTOCOLS: Final[dict[str, Protocol]] = {"after": after, "before": before}
