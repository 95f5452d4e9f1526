"""The bench's policies: what they keep, how much, and what they never drop."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.eviction_policies import (
    ONCE,
    RECENT,
    SINKS,
    TWICE,
    Policy,
    Queries,
    Seen,
    ahead,
    at_share_of,
    corm,
    corm_repeat,
    everything,
    expected,
    paged,
    protected,
    spread_over,
    top,
)

LAYERS, HEADS, GROUP, TOKENS, ROWS, DIM = 2, 2, 3, 200, 70, 8
POLICIES: dict[str, Policy] = {
    f"{name}, {variant}": policy
    for name, variants in {**ONCE, **TWICE}.items()
    for variant, policy in variants.items()
}
UNEVEN = ("adakv", "by layer", "all heads")


@pytest.fixture(scope="module")
def seen() -> Seen:
    torch.manual_seed(0)
    scores = 3 * torch.randn(LAYERS, ROWS, HEADS * GROUP, TOKENS)
    behind = torch.arange(TOKENS)[None] > torch.arange(TOKENS - ROWS, TOKENS)[:, None]
    weights = scores.masked_fill(behind[None, :, None], -torch.inf).softmax(-1)
    keys = torch.randn(LAYERS, HEADS, TOKENS, DIM)
    spread = torch.randn(LAYERS, HEADS * GROUP, DIM, DIM)
    queries = Queries(
        torch.randn(LAYERS, HEADS * GROUP, DIM), spread @ spread.mT / DIM, theta=100.0
    )
    repeat = torch.rand(LAYERS, HEADS, TOKENS)
    return Seen(
        weights,
        weights.sum(1),
        keys,
        torch.rand(LAYERS, HEADS, TOKENS) + 0.5,
        queries,
        torch.zeros(5),
        repeat,
        repeat * TOKENS,
    )


@pytest.mark.parametrize("name", POLICIES)
def test_a_baseline_keeps_the_share_it_is_given(seen: Seen, name: str) -> None:
    live = POLICIES[name](seen, 0.4)
    assert live.shape == (LAYERS, HEADS, TOKENS)
    assert float(live.float().mean()) == pytest.approx(0.4, abs=1e-6)
    assert live[..., protected(TOKENS)].all()
    assert int(protected(TOKENS).sum()) == SINKS + RECENT
    assert torch.equal(live, POLICIES[name](seen, 0.4))
    uneven = len(set(live.sum(-1).flatten().tolist())) > 1
    assert uneven == any(word in name for word in UNEVEN)


@pytest.mark.parametrize("name", [name for name, own in ONCE.items() if len(own) > 1])
def test_variants_differ_where_there_is_room(seen: Seen, name: str) -> None:
    found = [policy(seen, 0.7) for policy in {**ONCE, **TWICE}[name].values()]
    apart = sum(not torch.equal(found[0], other) for other in found[1:])
    assert apart >= len(found) - 2


@pytest.mark.parametrize(
    ("window", "weight"), [(70, 60.0), (32, 30.0), (500, 60.0), (32, 110.0), (70, 1000.0)]
)
def test_corm_keeps_what_a_recent_row_gave_its_share(
    seen: Seen, window: int, weight: float
) -> None:
    """Or half of its weight, where the share is more than that."""
    rows = min(window, ROWS)
    t = torch.arange(TOKENS - rows + 1, TOKENS + 1)
    asked = (weight / t).clamp(max=0.5)[None, :, None, None]
    hit = (seen.weights[:, ROWS - rows :] >= asked).any(1).view(LAYERS, HEADS, GROUP, TOKENS)
    live = corm(seen, window, weight)
    assert torch.equal(live, hit.any(2) | protected(TOKENS))
    assert float(live.float().mean()) < 1
    assert int(live.sum()) > LAYERS * HEADS * int(protected(TOKENS).sum())


def test_spread_keeps_what_follows(seen: Seen) -> None:
    shares = torch.zeros(1, 1, 12)
    shares[0, 0, [2, 7]] = torch.tensor([5.0, 3.0])
    assert spread_over(shares, 2)[0, 0].tolist() == [0, 0, 5, 5, 5, 0, 0, 3, 3, 3, 0, 0]
    assert torch.equal(spread_over(shares, 0), shares)
    plain, wide = (corm(seen, 70, 60.0, spread=count) for count in (0, 3))
    assert wide[plain].all()
    assert int(wide.sum()) > int(plain.sum())


def test_a_second_reading_is_observed_too(seen: Seen) -> None:
    again = corm_repeat(seen, 32, 0.9 * TOKENS)
    assert seen.repeat is not None
    once = corm(seen, 32, 0.9 * TOKENS)
    assert torch.equal(again, once | (seen.repeat >= 0.5)), "no more than half is asked for"
    lower = corm_repeat(seen, 32, 0.3 * TOKENS)
    assert torch.equal(lower, corm(seen, 32, 0.3 * TOKENS) | (seen.repeat >= 0.3))


def test_whole_pages_stay_while_any_token_does() -> None:
    hit = torch.zeros(2, 2, 200, dtype=torch.bool)
    hit[1, 0, 70] = True
    rule = lambda _: hit  # noqa: E731 - a rule is a function of what was seen
    shape = Seen(*[torch.zeros(2, 2, 200, 1)] * 4, *[torch.zeros(0)] * 2)  # type: ignore[arg-type]
    pages = paged(rule, 64, shape)
    assert pages.any(-1).all()
    assert torch.nonzero(pages[0, 1])[:, 0].tolist() == list(range(64, 128))
    tiles = paged(rule, 64, shape, by_head=True)
    assert int(tiles.sum()) == 64
    assert tiles[1, 0, 64:128].all()


def test_expected_weights_are_those_of_the_mean_query_where_queries_are_alike(seen: Seen) -> None:
    turn = ahead(seen, 64)
    angle = (TOKENS + torch.arange(64))[:, None] * 100.0 ** (-torch.arange(0, DIM, 2) / DIM)
    x = torch.randn(DIM, generator=torch.Generator().manual_seed(1))
    a, b = x.chunk(2)
    each = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)
    assert torch.allclose(turn @ x, each.mean(0), atol=1e-5)
    still = Queries(seen.queries.mean, torch.zeros_like(seen.queries.covariance), 100.0)
    like = Seen(seen.weights, seen.sums, seen.keys, seen.value_norms, still, seen.logits)
    live = expected(like, 0.4, 64, norms=False)
    query = (seen.queries.mean @ turn.T).view(LAYERS, HEADS, GROUP, DIM)
    weights = torch.einsum("lhgd,lhtd->lhgt", query, seen.keys) / DIM**0.5
    weights[..., :SINKS] = -torch.inf
    assert torch.equal(live, top(weights.softmax(-1).mean(2), 0.4))


def test_a_share_is_taken_prompt_by_prompt(seen: Seen) -> None:
    rule = partial(corm, window=70, weight=60.0)
    share = float(rule(seen).float().mean())
    live = at_share_of(ONCE["snapkv"]["rows 64, mean of 5"], rule, seen)
    assert float(live.float().mean()) == pytest.approx(share, abs=1 / TOKENS)
    assert everything(seen).all()


def test_scores_decide_within_a_budget() -> None:
    scores = torch.zeros(1, 1, 100)
    scores[0, 0, 40] = 1
    assert top(scores, 0.37)[0, 0, 40]
    assert not top(-scores, 0.9)[0, 0, 40]
