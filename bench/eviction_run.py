"""A suite answered over a dense KV cache in plain torch, part of its tokens masked by policies.

A prompt is computed once for all policies; what follows it is computed for them together, each a
branch with its own live tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.eviction_policies import Masks, Queries, Seen
from bench.quality_run import ANSWER_TOKENS, Item
from bench.quality_suite import Context, Probe, right
from kvkeep.models.host import HostedModel
from kvkeep.models.text import TextModel

ROWS: Final = 256
"""Of a prompt's last rows, those whose weights are kept."""
CHUNK: Final = 512
AGAIN: Final = 128
"""Tokens of a context that are read a second time at once, after `AGAIN_LEAD` before them."""
AGAIN_LEAD: Final = 8
MOST_ROWS: Final = 1024
"""Computed together."""
EACH: Final = 2
"""Questions of a task and context where each costs a prompt, or text of its own."""
BEYOND: Final = 3
"""Tokens said after as many as an answer has, to see it end."""


@dataclass(frozen=True, slots=True)
class Cache:
    """K and V of one sequence."""

    k: tuple[Tensor, ...]
    """[Hkv, T, D] per layer."""
    v: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """Return T."""
        return self.k[0].shape[1] if self.k else 0


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


class DenseKV:
    """What the model attends through for rows of one sequence; keeps queries and weights."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.q: list[Tensor] = []
        self.weights: list[Tensor] = []
        """[rows, Hq, T] per layer."""
        self.logits = torch.zeros(0)
        """[vocab] of the last row."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v [rows, Hkv, D]."""
        for kept, known, fresh in ((self.k, self._cache.k, k), (self.v, self._cache.v, v)):
            own = fresh.float().transpose(0, 1)
            kept.append(torch.cat([known[layer], own], 1) if known else own)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Return [rows, Hq, D]: each row sees what is not after it."""
        k, v = self.k[layer], self.v[layer]
        rows, heads, dim = q.shape
        tokens = k.shape[1]
        self.q.append(q.float())
        grouped = q.float().view(rows, k.shape[0], -1, dim)
        scores = torch.einsum("rhgd,htd->rhgt", grouped, k) / math.sqrt(dim)
        ahead = torch.arange(tokens) > torch.arange(tokens - rows, tokens)[:, None]
        weights = scores.masked_fill_(ahead[:, None, None], -math.inf).softmax(-1)
        self.weights.append(weights.flatten(1, 2))
        out = torch.einsum("rhgt,htd->rhgd", weights, v)
        return out.reshape(rows, heads, dim).to(q.dtype)


class BranchKV:
    """What the model attends through for branches of one sequence, each with its live tokens."""

    def __init__(self, cache: Cache, live: Tensor) -> None:
        """`live`: [B, L, Hkv, T]."""
        self._cache = cache
        self._dead = ~live
        self._branches = len(live)
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        """[B, Hkv, S, D] per layer of what followed."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v [B * rows, Hkv, D]."""
        fresh = [
            x.float().reshape(self._branches, -1, *x.shape[1:]).transpose(1, 2) for x in (k, v)
        ]
        known = self._own.get(layer)
        joined = fresh if known is None else [torch.cat(x, 2) for x in zip(known, fresh)]
        self._own[layer] = (joined[0], joined[1])

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Return [B * rows, Hq, D]."""
        k, v = self._cache.k[layer], self._cache.v[layer]
        own_k, own_v = self._own[layer]
        dim, tokens, after = q.shape[-1], k.shape[1], own_k.shape[2]
        grouped = q.float().view(self._branches, -1, k.shape[0], q.shape[1] // k.shape[0], dim)
        rows = grouped.shape[1]
        before = torch.einsum("brhgd,htd->brhgt", grouped, k)
        before.masked_fill_(self._dead[:, layer][:, None, :, None], -math.inf)
        since = torch.einsum("brhgd,bhsd->brhgs", grouped, own_k)
        ahead = torch.arange(after) > torch.arange(after - rows, after)[:, None]
        since.masked_fill_(ahead[:, None, None], -math.inf)
        weights = (torch.cat([before, since], -1) / math.sqrt(dim)).softmax(-1)
        out = torch.einsum("brhgt,htd->brhgd", weights[..., :tokens], v)
        out += torch.einsum("brhgs,bhsd->brhgd", weights[..., tokens:], own_v)
        return out.reshape(q.shape).to(q.dtype)


class Reader:
    """Runs a model over dense caches."""

    def __init__(self, model: HostedModel, theta: float, text: TextModel | None = None) -> None:
        """`theta`: base of the rotary embedding; `text`: None where a model speaks in ids."""
        self._model = model
        self._theta = theta
        self._text = text

    def read(self, cache: Cache, ids: Sequence[int]) -> tuple[Cache, DenseKV]:
        """Append tokens; return the cache and what was attended to."""
        kv = DenseKV(cache)
        positions = torch.arange(cache.tokens, cache.tokens + len(ids))
        last = torch.tensor([len(ids) - 1])
        kv.logits = self._model.forward(torch.tensor(ids), positions, kv, last)[0]
        return Cache(tuple(kv.k), tuple(kv.v)), kv

    def see(self, ids: Sequence[int], *, twice: bool = False) -> tuple[Cache, Seen]:
        """Compute a prompt whole; `twice`: read it again over what was kept of the first time."""
        cache, seen = self.see_more(Cache((), ()), None, ids)
        if twice:
            seen = self._again(cache, seen, ids)
        return cache, seen

    def see_more(self, cache: Cache, seen: Seen | None, ids: Sequence[int]) -> tuple[Cache, Seen]:
        """Compute more of a prompt; of a second reading, new tokens count as looked at."""
        count = cache.tokens
        for begin in range(0, len(ids), CHUNK):
            cache, kv = self.read(cache, ids[begin : begin + CHUNK])
            seen = self._joined(seen, kv, count)
            count = cache.tokens
        if seen is None:
            raise ValueError("a prompt has at least one token")
        return cache, seen

    def _joined(self, seen: Seen | None, kv: DenseKV, known: int) -> Seen:
        """Return what was seen so far of `known` tokens, with a step's rows."""
        weights, keys = torch.stack(kv.weights), torch.stack(kv.k)
        norms = torch.stack(kv.v).norm(dim=-1)
        fresh = self._queries(torch.stack(kv.q), known)
        if seen is None:
            return Seen(weights[:, -ROWS:], weights.sum(1), keys, norms, fresh, kv.logits)
        rows = weights.shape[1]
        more = (0, rows)
        kept = torch.cat([pad(seen.weights, more), weights], 1)[:, -ROWS:]
        share = rows / (known + rows)
        mean = torch.lerp(seen.queries.mean, fresh.mean, share)
        spread = torch.lerp(seen.queries.covariance, fresh.covariance, share)
        return Seen(
            kept,
            pad(seen.sums, more) + weights.sum(1),
            keys,
            norms,
            Queries(mean, spread, self._theta),
            kv.logits,
            None if seen.repeat is None else pad(seen.repeat, more, value=math.inf),
            None if seen.repeat_share is None else pad(seen.repeat_share, more, value=math.inf),
        )

    def _queries(self, turned: Tensor, first: int) -> Queries:
        """Return what queries [L, rows, Hq, D] from a position on were like before the turn."""
        dim = turned.shape[-1]
        inverse = self._theta ** (-torch.arange(0, dim, 2).float() / dim)
        angle = torch.arange(first, first + turned.shape[1]).float()[:, None] * inverse
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = turned.chunk(2, -1)
        plain = torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
        mean = plain.mean(1)
        off = plain - mean[:, None]
        spread = torch.einsum("lrhd,lrhe->lhde", off, off) / turned.shape[1]
        return Queries(mean, spread, self._theta)

    def _again(self, cache: Cache, seen: Seen, ids: Sequence[int]) -> Seen:
        """Read the context a second time, part by part, each part right after the first time."""
        tokens = cache.tokens
        found = torch.zeros(seen.keys.shape[:3])
        shares = torch.zeros_like(found)
        for begin in range(0, tokens, AGAIN):
            part = ids[max(0, begin - AGAIN_LEAD) : begin + AGAIN]
            _, kv = self.read(cache, part)
            weights = torch.stack(kv.weights)[..., :tokens]
            count = torch.arange(tokens + 1, tokens + len(part) + 1)[None, :, None, None]
            found = found.maximum(seen.by_group(weights.amax(1)).amax(-2))
            shares = shares.maximum(seen.by_group((weights * count).amax(1)).amax(-2))
        return replace(seen, repeat=found, repeat_share=shares)

    def length(self, probe: Probe) -> int:
        """Return how many tokens the right answer has."""
        if probe.copied or self._text is None:
            return len(probe.copied)
        return len(self._text.encode(" " + probe.answer, add_special_tokens=False))

    def steps(self, probe: Probe) -> int:
        """Return how many tokens an answer is given."""
        length = self.length(probe)
        return length if probe.copied else min(ANSWER_TOKENS, length + BEYOND)

    def ask(
        self, cache: Cache, live: Tensor, probes: Sequence[Probe], ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the scores [P][Q] of questions for live tokens [P, L, Hkv, T].

        `ids`: what of each follows the cache; all have equally many, and as many steps.
        """
        rows, steps = len(ids[0]), self.steps(probes[0])
        at_once = max(1, MOST_ROWS // (len(probes) * rows))
        found: list[list[float]] = []
        for begin in range(0, len(live), at_once):
            part = live[begin : begin + at_once]
            said = self._said(cache, part.repeat_interleave(len(probes), 0), ids, steps)
            found += [
                [self._score(p, said[i * len(probes) + j]) for j, p in enumerate(probes)]
                for i in range(len(part))
            ]
        return found

    def go_on(self, cache: Cache, live: Tensor, probe: Probe, first: int) -> list[float]:
        """Return the scores [P] of answers that begin with a token from the full cache."""
        told = self._said(cache, live, [[first]], self.steps(probe) - 1)
        if probe.copied:
            rest = msgspec.structs.replace(probe, copied=probe.copied[1:])
            return [self._score(rest, one) for one in told]
        return [self._score(probe, (first, *one)) for one in told]

    def _said(
        self, cache: Cache, live: Tensor, ids: Sequence[Sequence[int]], steps: int
    ) -> list[tuple[int, ...]]:
        """Return what each branch says greedily in so many tokens; questions go round."""
        kv, branches = BranchKV(cache, live), len(live)
        token_ids = torch.tensor(ids).repeat(branches // len(ids), 1)
        position, said = cache.tokens, []
        for _ in range(steps):
            rows = token_ids.shape[1]
            positions = torch.arange(position, position + rows).repeat(branches)
            last = torch.arange(rows - 1, branches * rows, rows)
            logits = self._model.forward(token_ids.flatten(), positions, kv, last)
            position += rows
            token_ids = logits.argmax(-1, keepdim=True)
            said.append(token_ids[:, 0])
        return [tuple(one) for one in torch.stack(said, 1).tolist()]

    def _score(self, probe: Probe, said: tuple[int, ...]) -> float:
        return right(probe, "" if self._text is None else self._text.decode(said), said)


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
        cache, seen = reader.see(context.ids, twice=twice)
        long = [probe for probe in context.probes if reader.length(probe) > 1]
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
