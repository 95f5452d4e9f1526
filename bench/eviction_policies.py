"""Which tokens published policies keep of a prompt, at a budget or by their own rule.

Each is a function of what was seen while the prompt was computed; it returns live tokens
[L, Hkv, T]. Sinks and the latest tokens are kept by all. Sources: StreamingLLM (2309.17453), H2O
(2306.14048), TOVA (2401.06104), SnapKV (2404.14469), AdaKV (2407.11550), KeyDiff (2504.15364).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize

SINKS: Final = 4
RECENT: Final = 32
SNAP_ROWS: Final = 64
SNAP_POOL: Final = 5
FLOOR: Final = 0.2


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt of T tokens as a model attended to it."""

    weights: Tensor
    """[L, R, Hq, T] of its last R rows."""
    sums: Tensor
    """[L, Hq, T] of all rows."""
    keys: Tensor
    """[L, Hkv, T, D]"""

    @property
    def group(self) -> int:
        """Return the query heads of a KV head."""
        return self.sums.shape[1] // self.keys.shape[1]

    def grouped(self, by_head: Tensor) -> Tensor:
        """Return the mean over each group's heads of [..., Hq, T]."""
        *lead, _, tokens = by_head.shape
        return by_head.reshape(*lead, -1, self.group, tokens).mean(-2)


Policy = Callable[[Seen, float], Tensor]
"""Returns live tokens [L, Hkv, T] of a prompt at a kept share."""


def protected(tokens: int, recent: int = RECENT) -> Tensor:
    """Return [T] what stays in any case."""
    at = torch.arange(tokens)
    return (at < SINKS) | (at >= tokens - recent)


def top(scores: Tensor, share: float) -> Tensor:
    """Return the highest scores [L, Hkv, T] of each head, protected tokens among them."""
    tokens = scores.shape[-1]
    count = min(tokens, max(round(share * tokens), int(protected(tokens).sum())))
    scores = scores.float().masked_fill(protected(tokens), torch.inf)
    live = torch.zeros_like(scores, dtype=torch.bool)
    return live.scatter_(-1, scores.topk(count, dim=-1).indices, value=True)


def corm(seen: Seen, window: int, weight: float) -> Tensor:
    """Return what some head of a group gave c / t or more in one of the last w rows."""
    rows, tokens = seen.weights.shape[1], seen.weights.shape[-1]
    w = min(window, rows)
    least = weight / torch.arange(tokens - w + 1, tokens + 1)
    hit = seen.weights[:, rows - w :] >= least[None, :, None, None]
    by_head = hit.any(1)
    found = by_head.reshape(len(by_head), -1, seen.group, tokens).any(2)
    return found | protected(tokens)


def streaming(seen: Seen, share: float) -> Tensor:
    """Keep the first tokens and the latest."""
    tokens = seen.keys.shape[2]
    return top(torch.arange(tokens).expand(*seen.keys.shape[:2], -1), share)


def random_tokens(seen: Seen, share: float) -> Tensor:
    """Keep tokens at random."""
    return top(torch.rand(seen.keys.shape[:3], generator=torch.Generator().manual_seed(0)), share)


def h2o(seen: Seen, share: float) -> Tensor:
    """Keep half by the sum of all weights, half the latest."""
    scores = seen.grouped(seen.sums)
    tokens = scores.shape[-1]
    latest = torch.arange(tokens) >= tokens - round(share * tokens / 2)
    return top(scores.masked_fill(latest, torch.inf), share)


def tova(seen: Seen, share: float) -> Tensor:
    """Keep by the last row's weight, a mean over the layer's heads."""
    scores = seen.weights[:, -1].mean(1, keepdim=True)
    return top(scores.expand(-1, seen.keys.shape[1], -1), share)


def snap_scores(seen: Seen) -> Tensor:
    """Return the last rows' mean weight, smoothed over neighbours."""
    scores = seen.grouped(seen.weights[:, -SNAP_ROWS:].mean(1))
    return avg_pool1d(scores, SNAP_POOL, 1, SNAP_POOL // 2)


def snapkv(seen: Seen, share: float) -> Tensor:
    """Keep by the last rows' smoothed weights."""
    return top(snap_scores(seen), share)


def adakv(seen: Seen, share: float) -> Tensor:
    """Keep SnapKV's best over all heads of a layer, a part of the budget safe for each."""
    scores = snap_scores(seen)
    layers, heads, tokens = scores.shape
    safe = top(scores, FLOOR * share) | protected(tokens)
    scores = scores.masked_fill(safe, torch.inf).view(layers, -1)
    count = max(round(share * heads * tokens), int(safe.sum((1, 2)).max()))
    live = torch.zeros_like(scores, dtype=torch.bool)
    return live.scatter_(-1, scores.topk(count, -1).indices, value=True).view(layers, heads, tokens)


def keydiff(seen: Seen, share: float) -> Tensor:
    """Keep the keys least like the mean key."""
    unit = normalize(seen.keys.float(), dim=-1)
    return top(-(unit * normalize(unit.mean(2, keepdim=True), dim=-1)).sum(-1), share)


BASELINES: Final[dict[str, Policy]] = {
    "streaming": streaming,
    "h2o": h2o,
    "tova": tova,
    "snapkv": snapkv,
    "adakv": adakv,
    "keydiff": keydiff,
    "random": random_tokens,
}
