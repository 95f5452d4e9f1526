"""A suite answered over a dense KV cache in plain torch, part of its tokens masked by a policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bench.eviction_policies import Seen
from bench.quality_run import ANSWER_TOKENS, Item
from bench.quality_suite import COPIED, Context, Probe, right
from kvkeep.models.host import HostedModel
from kvkeep.models.text import TextModel

ROWS: Final = 256
"""Of a prompt's last rows, those whose weights are kept."""
CHUNK: Final = 512


@dataclass(frozen=True, slots=True)
class Cache:
    """K and V of one sequence."""

    k: tuple[Tensor, ...]
    """[Hkv, T, D] per layer."""
    v: tuple[Tensor, ...]
    live: Tensor | None = None
    """[L, Hkv, T'] of the first T' tokens."""

    @property
    def tokens(self) -> int:
        """Return T."""
        return self.k[0].shape[1] if self.k else 0


class DenseKV:
    """What the model attends through for one forward; keeps the rows' weights."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.weights: list[Tensor] = []
        """[rows, Hq, T] per layer."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v [rows, Hkv, D]."""
        for kept, known, fresh in ((self.k, self._cache.k, k), (self.v, self._cache.v, v)):
            own = fresh.float().transpose(0, 1)
            kept.append(torch.cat([known[layer], own], 1) if known else own)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Return [rows, Hq, D]: each row sees what lives and is not after it."""
        k, v = self.k[layer], self.v[layer]
        rows, heads, dim = q.shape
        tokens = k.shape[1]
        grouped = q.float().view(rows, k.shape[0], -1, dim)
        scores = torch.einsum("rhgd,htd->rhgt", grouped, k) / math.sqrt(dim)
        at = torch.arange(tokens)
        ahead = at[None] > torch.arange(tokens - rows, tokens)[:, None]
        scores.masked_fill_(ahead[:, None, None], -math.inf)
        if self._cache.live is not None:
            dead = torch.zeros(k.shape[:2], dtype=torch.bool)
            dead[:, : self._cache.live.shape[2]] = ~self._cache.live[layer]
            scores.masked_fill_(dead[None, :, None], -math.inf)
        weights = scores.softmax(-1)
        self.weights.append(weights.flatten(1, 2))
        out = torch.einsum("rhgt,htd->rhgd", weights, v)
        return out.reshape(rows, heads, dim).to(q.dtype)


class Reader:
    """Runs a model over dense caches."""

    def __init__(self, model: HostedModel, text: TextModel) -> None:
        self._model = model
        self._text = text

    def read(self, cache: Cache, ids: Sequence[int]) -> tuple[Cache, Tensor, DenseKV]:
        """Append tokens; return the cache, the last row's logits and what was attended to."""
        kv = DenseKV(cache)
        positions = torch.arange(cache.tokens, cache.tokens + len(ids))
        last = torch.tensor([len(ids) - 1])
        logits = self._model.forward(torch.tensor(ids), positions, kv, last)
        return Cache(tuple(kv.k), tuple(kv.v), cache.live), logits[0], kv

    def see(self, ids: Sequence[int]) -> tuple[Cache, Seen]:
        """Compute a prompt whole."""
        cache, kept, sums = Cache((), ()), torch.zeros(0), torch.zeros(0)
        for begin in range(0, len(ids), CHUNK):
            cache, _, kv = self.read(cache, ids[begin : begin + CHUNK])
            weights = torch.stack(kv.weights)
            grow = (0, weights.shape[-1] - (sums.shape[-1] if begin else 0))
            sums = weights.sum(1) + (torch.nn.functional.pad(sums, grow) if begin else 0)
            kept = _rows(kept if begin else None, weights)
        return cache, Seen(kept, sums, torch.stack(cache.k))

    def ask(self, cache: Cache, probe: Probe) -> float:
        """Return the score of an answer to a question that follows the cache."""
        cache, logits, _ = self.read(cache, probe.ids)
        return self.score(cache, logits, probe)

    def score(self, cache: Cache, logits: Tensor, probe: Probe) -> float:
        """Return the score of the greedy answer."""
        said: list[int] = []
        for _ in range(COPIED if probe.copied else ANSWER_TOKENS):
            said.append(int(logits.argmax()))
            cache, logits, _ = self.read(cache, said[-1:])
        return right(probe, self._text.decode(said), tuple(said))


def after(
    reader: Reader, contexts: Sequence[Context], policies: dict[str, Callable[[Seen], Tensor]]
) -> Iterator[tuple[str, float, list[Item]]]:
    """Yield (policy, kept share, items) per context: questions come once it is compressed."""
    for i, context in enumerate(contexts):
        cache, seen = reader.see(context.ids)
        for name, policy in policies.items():
            live = policy(seen)
            part = Cache(cache.k, cache.v, live)
            items = [Item(p.task, i, reader.ask(part, p)) for p in context.probes]
            yield name, float(live.float().mean()), items


def before(
    reader: Reader, contexts: Sequence[Context], policies: dict[str, Callable[[Seen], Tensor]]
) -> Iterator[tuple[str, float, list[Item]]]:
    """Yield the same for questions that stand in the prompt."""
    for i, context in enumerate(contexts):
        whole, seen = reader.see(context.ids)
        found: dict[str, list[tuple[float, Item]]] = {name: [] for name in policies}
        for probe in context.probes:
            cache, logits, kv = reader.read(whole, probe.ids)
            weights = torch.stack(kv.weights)
            padded = torch.nn.functional.pad(seen.sums, (0, len(probe.ids)))
            asked = Seen(
                _rows(seen.weights, weights), padded + weights.sum(1), torch.stack(cache.k)
            )
            for name, policy in policies.items():
                live = policy(asked)
                score = reader.score(Cache(cache.k, cache.v, live), logits, probe)
                found[name].append((float(live.float().mean()), Item(probe.task, i, score)))
        for name, pairs in found.items():
            yield name, sum(kept for kept, _ in pairs) / len(pairs), [item for _, item in pairs]


def _rows(known: Tensor | None, fresh: Tensor) -> Tensor:
    """Return the weights [L, R, Hq, T] of the last rows."""
    if known is None:
        return fresh[:, -ROWS:]
    padded = torch.nn.functional.pad(known, (0, fresh.shape[-1] - known.shape[-1]))
    return torch.cat([padded, fresh], 1)[:, -ROWS:]
