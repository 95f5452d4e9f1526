"""Which tokens published policies keep of a prompt, at a budget, and what CORM keeps by its rule.

Each is a function of what was seen while the prompt was computed; it returns live tokens
[L, Hkv, T]. Sinks and the latest tokens are kept by all. A baseline has variants, the published
setting first. Sources: StreamingLLM (2309.17453), H2O (2306.14048), Scissorhands (2305.17118), TOVA
(2401.06104), SnapKV (2404.14469), AdaKV (2407.11550), KeyDiff (2504.15364), Expected Attention
(2510.00636), KVzip (2505.23416). A mask frees nothing by itself: kept shares say what it would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, normalize, pad

SINKS: Final = 4
RECENT: Final = 32
MOST: Final = 0.5
"""Of a row's weight, what CORM asks of a token in any case: on short prompts c / t may be more."""
FLOOR: Final = 0.2
"""Of the budget, what is safe for each head where heads compete."""
FUTURE: Final = 512
"""Positions ahead over which Expected Attention averages."""
NUDGE: Final = 1e-2
SLACK: Final = 1e-5
"""A weight counts as its share but for rounding."""


@dataclass(frozen=True, slots=True)
class Queries:
    """What a prompt's queries were like before they were turned by position."""

    mean: Tensor
    """[L, Hq, D]"""
    covariance: Tensor
    """[L, Hq, D, D]"""
    theta: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt of T tokens as a model attended to it."""

    weights: Tensor
    """[L, R, Hq, T] of its last R rows."""
    sums: Tensor
    """[L, Hq, T] of all rows."""
    keys: Tensor
    """[L, Hkv, T, D]"""
    value_norms: Tensor
    """[L, Hkv, T]"""
    queries: Queries
    logits: Tensor
    """[vocab] of the last row."""
    repeat: Tensor | None = None
    """[L, Hkv, T] largest weight that a row of a second reading gave, if there was one."""
    repeat_share: Tensor | None = None
    """The same in shares of the mean weight."""
    _shares: dict[int, Tensor] = field(default_factory=dict)
    _weights: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Return T."""
        return self.keys.shape[2]

    @property
    def group(self) -> int:
        """Return the query heads of a KV head."""
        return self.sums.shape[1] // self.keys.shape[1]

    def by_group(self, by_head: Tensor) -> Tensor:
        """Return [..., Hq, T] as [..., Hkv, G, T]."""
        *lead, _, tokens = by_head.shape
        return by_head.reshape(*lead, -1, self.group, tokens)

    def grouped(self, by_head: Tensor) -> Tensor:
        """Return the mean over each group's heads of [..., Hq, T]."""
        return self.by_group(by_head).mean(-2)

    def share(self, window: int) -> Tensor:
        """Return [L, Hkv, T], in shares of the mean weight the most that one of w rows gave."""
        w = min(window, self.weights.shape[1])
        if w not in self._shares:
            seen = torch.arange(self.tokens - w + 1, self.tokens + 1)
            by_head = (self.weights[:, -w:] * seen[None, :, None, None]).amax(1)
            self._shares[w] = self.by_group(by_head).amax(-2)
        return self._shares[w]

    def weight(self, window: int) -> Tensor:
        """Return [L, Hkv, T] the most weight that one of w rows gave."""
        w = min(window, self.weights.shape[1])
        if w not in self._weights:
            self._weights[w] = self.by_group(self.weights[:, -w:].amax(1)).amax(-2)
        return self._weights[w]


Policy = Callable[[Seen, float], Tensor]
"""Returns live tokens [L, Hkv, T] of a prompt at a kept share."""
Masks = Callable[[Seen], Tensor]


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


def competing(scores: Tensor, share: float, *, layers_too: bool = False) -> Tensor:
    """Return the highest scores over all heads of a layer, or of all, some safe for each."""
    layers, _, tokens = scores.shape
    safe = top(scores, FLOOR * share) | protected(tokens)
    flat = scores.float().masked_fill(safe, torch.inf).view(1 if layers_too else layers, -1)
    count = max(round(share * flat.shape[1]), int(safe.view(flat.shape).sum(1).max()))
    live = torch.zeros_like(flat, dtype=torch.bool)
    return live.scatter_(-1, flat.topk(count, -1).indices, value=True).view(scores.shape)


def everything(seen: Seen) -> Tensor:
    """Keep all."""
    return torch.ones(seen.keys.shape[:3], dtype=torch.bool)


def corm(
    seen: Seen,
    window: int,
    weight: float,
    recent: int = RECENT,
    spread: int = 0,
    most: float = MOST,
) -> Tensor:
    """Return what some head of a group gave c / t, or `most`, in one of the last w rows.

    `spread`: so many tokens after such a one stay too.
    """
    hit = spread_over(seen.share(window), spread) >= weight - SLACK
    if most * (seen.tokens - window) < weight:  # some row's c / t may be above it
        hit |= spread_over(seen.weight(window), spread) >= most - SLACK
    return hit | protected(seen.tokens, recent)


def corm_repeat(
    seen: Seen, window: int, weight: float, recent: int = RECENT, spread: int = 0
) -> Tensor:
    """Return the same where rows of a second reading are observed too."""
    if seen.repeat_share is None or seen.repeat is None:
        raise ValueError("this prompt was read once only")
    again = spread_over(seen.repeat_share, spread) >= weight - SLACK
    if MOST * seen.tokens < weight:
        again |= spread_over(seen.repeat, spread) >= MOST - SLACK
    return corm(seen, window, weight, recent, spread) | again


def spread_over(shares: Tensor, count: int) -> Tensor:
    """Return the largest of each token's and so many before it, of [L, Hkv, T]."""
    return max_pool1d(pad(shares, (count, 0)), count + 1, 1) if count else shares


def paged(rule: Masks, page: int, seen: Seen, *, by_head: bool = False) -> Tensor:
    """Keep whole pages in which a rule keeps a token, in any head or each head by itself."""
    live = rule(seen)
    whole = pad(live, (0, -seen.tokens % page)).view(*live.shape[:2], -1, page).any(-1)
    if not by_head:
        whole = whole.any(0).any(0).expand(whole.shape)
    kept: Tensor = whole.repeat_interleave(page, -1)[..., : seen.tokens]
    return kept


def at_share_of(policy: Policy, rule: Masks, seen: Seen) -> Tensor:
    """Keep by a policy as much as a rule does."""
    return policy(seen, float(rule(seen).float().mean()))


def streaming(seen: Seen, share: float) -> Tensor:
    """Keep the first tokens and the latest."""
    return top(torch.arange(seen.tokens).expand(*seen.keys.shape[:2], -1), share)


def random_tokens(seen: Seen, share: float) -> Tensor:
    """Keep tokens at random."""
    return top(torch.rand(seen.keys.shape[:3], generator=torch.Generator().manual_seed(0)), share)


def h2o(seen: Seen, share: float, latest: float = 0.5) -> Tensor:
    """Keep by the sum of all weights, a part of the budget for the latest."""
    scores = seen.grouped(seen.sums)
    recent = torch.arange(seen.tokens) >= seen.tokens - round(latest * share * seen.tokens)
    return top(scores.masked_fill(recent, torch.inf), share)


def scissorhands(seen: Seen, share: float, rows: int = 256, latest: float = 0.25) -> Tensor:
    """Keep what most often had its share of the weight, a part of the budget for the latest."""
    kept = seen.weights[:, -rows:]
    count = kept.shape[1]
    least = 1.0 / torch.arange(seen.tokens - count + 1, seen.tokens + 1)
    pivotal = (kept >= least[None, :, None, None]).float().mean(1)
    recent = torch.arange(seen.tokens) >= seen.tokens - round(latest * share * seen.tokens)
    scores = seen.grouped(pivotal + 1e-3 * seen.sums / seen.tokens)  # ties: the more weight
    return top(scores.masked_fill(recent, torch.inf), share)


def tova(seen: Seen, share: float, *, by_head: bool = False) -> Tensor:
    """Keep by the last row's weight, a mean over the layer's heads or the group's."""
    last = seen.weights[:, -1]
    scores = seen.grouped(last) if by_head else last.mean(1, keepdim=True)
    return top(scores.expand(-1, seen.keys.shape[1], -1), share)


def snap_scores(seen: Seen, rows: int = 64, pool: int = 5, *, most: bool = False) -> Tensor:
    """Return the last rows' mean weight, neighbours' mean or the most of them."""
    pooled = max_pool1d if most else avg_pool1d
    return pooled(seen.grouped(seen.weights[:, -rows:].mean(1)), pool, 1, pool // 2)


def snapkv(
    seen: Seen, share: float, rows: int = 64, pool: int = 5, *, most: bool = False
) -> Tensor:
    """Keep by the last rows' smoothed weights."""
    return top(snap_scores(seen, rows, pool, most=most), share)


def adakv(seen: Seen, share: float, rows: int = 64, pool: int = 5, *, most: bool = False) -> Tensor:
    """Keep SnapKV's best over all heads of a layer."""
    return competing(snap_scores(seen, rows, pool, most=most), share)


def keydiff(seen: Seen, share: float) -> Tensor:
    """Keep the keys least like the mean key."""
    unit = normalize(seen.keys.float(), dim=-1)
    return top(-(unit * normalize(unit.mean(2, keepdim=True), dim=-1)).sum(-1), share)


def ahead(seen: Seen, future: int) -> Tensor:
    """Return [D, D], the mean of the turns of the next positions."""
    dim = seen.keys.shape[-1]
    inverse = seen.queries.theta ** (-torch.arange(0, dim, 2).float() / dim)
    angle = torch.arange(seen.tokens, seen.tokens + future).float()[:, None] * inverse
    cos, sin = angle.cos().mean(0).diag(), angle.sin().mean(0).diag()
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0)


def expected(
    seen: Seen, share: float, future: int = FUTURE, *, norms: bool = True, adaptive: bool = False
) -> Tensor:
    """Keep by the weight that queries like those so far would give, times the value's length."""
    turn, dim = ahead(seen, future), seen.keys.shape[-1]
    mean = seen.queries.mean @ turn.T
    spread = turn @ seen.queries.covariance @ turn.T
    keys = seen.keys.repeat_interleave(seen.group, 1).float()
    scores = torch.einsum("lhtd,lhd->lht", keys, mean) / math.sqrt(dim)
    scores += torch.einsum("lhtd,lhde,lhte->lht", keys, spread, keys) / (2 * dim)
    scores[..., :SINKS] = -torch.inf
    found = seen.grouped(scores.softmax(-1)) + NUDGE
    found = found * seen.value_norms if norms else found
    return competing(found, share) if adaptive else top(found, share)


def kvzip(seen: Seen, share: float, *, uniform: bool = False) -> Tensor:
    """Keep by the largest weight while the context is read a second time."""
    if seen.repeat is None:
        raise ValueError("this prompt was read once only")
    return top(seen.repeat, share) if uniform else competing(seen.repeat, share, layers_too=True)


SNAPS: Final = (
    (64, 5, False),
    (32, 5, False),
    (16, 5, False),
    (32, 17, False),
    (32, 33, False),
    (16, 33, False),
    (64, 33, True),
    (32, 17, True),
    (32, 33, True),
    (16, 33, True),
)
"""Rows, neighbours and whether their most counts; as wide as what CORM's spread may keep."""
Variants = dict[str, Policy]
"""By name; the published setting comes first."""

ONCE: Final[dict[str, Variants]] = {
    "streaming": {"4 sinks": streaming},
    "h2o": {f"latest {part:g}": partial(h2o, latest=part) for part in (0.5, 0.25, 0.1)},
    "scissorhands": {
        f"rows {rows}, latest {part:g}": partial(scissorhands, rows=rows, latest=part)
        for rows, part in ((256, 0.25), (256, 0.1), (64, 0.1), (32, 0.1))
    },
    "tova": {"layer": tova, "group": partial(tova, by_head=True)},
    **{
        name: {
            f"rows {rows}, {'most' if most else 'mean'} of {pool}": partial(
                policy, rows=rows, pool=pool, most=most
            )
            for rows, pool, most in SNAPS
        }
        for name, policy in (("snapkv", snapkv), ("adakv", adakv))
    },
    "keydiff": {"cosine": keydiff},
    "expected attention": {
        "next 512": expected,
        "next 512, by layer": partial(expected, adaptive=True),
        "next 64, by layer": partial(expected, future=64, adaptive=True),
        "next 64, by layer, no norms": partial(expected, future=64, norms=False, adaptive=True),
    },
    "random": {"uniform": random_tokens},
}
"""Baselines that read a prompt once."""

TWICE: Final[dict[str, Variants]] = {
    "kvzip": {"all heads": kvzip, "equal heads": partial(kvzip, uniform=True)}
}
"""Baselines that read it a second time."""
