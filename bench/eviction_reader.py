"""A model run over dense caches in plain torch, for policies together: each its own live tokens.

A prompt is computed once for all; what follows it is computed for branches of it. What the first
branch says is given to the others at once, and only those that would have said something else
go on token by token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.eviction_policies import Queries, Seen
from bench.quality_run import ANSWER_TOKENS
from bench.quality_suite import Probe, right
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
        told = self._said(cache, live, ids, self.steps(probes[0]))
        return [[self._score(p, one) for p, one in zip(probes, own, strict=True)] for own in told]

    def go_on(self, cache: Cache, live: Tensor, probe: Probe, first: int) -> list[float]:
        """Return the scores [P] of answers that begin with a token from the full cache."""
        told = self._said(cache, live, [[first]], self.steps(probe) - 1)
        if probe.copied:
            rest = msgspec.structs.replace(probe, copied=probe.copied[1:])
            return [self._score(rest, one) for (one,) in told]
        return [self._score(probe, (first, *one)) for (one,) in told]

    def _said(
        self, cache: Cache, live: Tensor, ids: Sequence[Sequence[int]], steps: int
    ) -> list[list[tuple[int, ...]]]:
        """Return [P][Q] what is said greedily in so many tokens for live tokens [P, L, Hkv, T].

        The first says it token by token. Others are given that at once: who would have said the
        same at each place says the same. The rest go token by token.
        """
        first = self._greedy(cache, live[:1].expand(len(ids), -1, -1, -1), ids, steps)
        found = [first]
        at_once = max(1, MOST_ROWS // (len(ids) * (len(ids[0]) + steps - 1)))
        for begin in range(1, len(live), at_once):
            part = live[begin : begin + at_once]
            own = [list(first) for _ in part]
            other = self._unlike(cache, part, ids, first)
            if other:
                mine = part[[policy for policy, _ in other]]
                said = self._greedy(cache, mine, [ids[question] for _, question in other], steps)
                for (policy, question), one in zip(other, said, strict=True):
                    own[policy][question] = one
            found += own
        return found

    def _unlike(
        self,
        cache: Cache,
        live: Tensor,
        ids: Sequence[Sequence[int]],
        said: Sequence[tuple[int, ...]],
    ) -> list[tuple[int, int]]:
        """Return (policy, question) where another token than `said` would have come somewhere."""
        count, asked, steps = len(live), len(ids), len(said[0])
        kv = BranchKV(cache, live.repeat_interleave(asked, 0))
        given = [[*own, *told[:-1]] for own, told in zip(ids, said, strict=True)]
        logits = self._rows(cache.tokens, torch.tensor(given).repeat(count, 1), kv, steps)
        would = logits.argmax(-1).view(count, asked, steps)
        unlike = (would != torch.tensor(said)).any(-1)
        return [(policy, question) for policy, question in unlike.nonzero().tolist()]

    def _greedy(
        self, cache: Cache, live: Tensor, ids: Sequence[Sequence[int]], steps: int
    ) -> list[tuple[int, ...]]:
        """Return what each branch says token by token after its own `ids`."""
        kv = BranchKV(cache, live)
        fresh, position, said = torch.tensor(ids), cache.tokens, []
        for _ in range(steps):
            logits = self._rows(position, fresh, kv, 1)
            position += fresh.shape[1]
            fresh = logits.argmax(-1)
            said.append(fresh[:, 0])
        return [tuple(one) for one in torch.stack(said, 1).tolist()]

    def _rows(self, position: int, ids: Tensor, kv: BranchKV, last: int) -> Tensor:
        """Return [B, last, vocab] of the last rows of tokens [B, rows] from a position on."""
        branches, rows = ids.shape
        positions = torch.arange(position, position + rows).repeat(branches)
        wanted = torch.arange(branches * rows).view(branches, rows)[:, rows - last :]
        logits: Tensor = self._model.forward(ids.flatten(), positions, kv, wanted.flatten())
        return logits.view(branches, last, -1)

    def _score(self, probe: Probe, said: tuple[int, ...]) -> float:
        return right(probe, "" if self._text is None else self._text.decode(said), said)
