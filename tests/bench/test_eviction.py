"""The bench's policies: what they keep, how much, and what they never drop."""

from __future__ import annotations

import pytest
import torch

from bench.eviction_policies import BASELINES, RECENT, SINKS, Seen, corm, protected, top

LAYERS, HEADS, GROUP, TOKENS, ROWS = 2, 2, 3, 200, 70


@pytest.fixture(scope="module")
def seen() -> Seen:
    torch.manual_seed(0)
    scores = 3 * torch.randn(LAYERS, ROWS, HEADS * GROUP, TOKENS)
    ahead = torch.arange(TOKENS)[None] > torch.arange(TOKENS - ROWS, TOKENS)[:, None]
    weights = scores.masked_fill(ahead[None, :, None], -torch.inf).softmax(-1)
    return Seen(weights, weights.sum(1), torch.randn(LAYERS, HEADS, TOKENS, 8))


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_keeps_the_share_it_is_given(seen: Seen, name: str) -> None:
    live = BASELINES[name](seen, 0.4)
    assert live.shape == (LAYERS, HEADS, TOKENS)
    assert float(live.float().mean()) == pytest.approx(0.4, abs=1e-6)
    assert live[..., protected(TOKENS)].all()
    assert int(protected(TOKENS).sum()) == SINKS + RECENT
    again = BASELINES[name](seen, 0.4)
    assert torch.equal(live, again)


def test_only_adakv_lets_heads_differ(seen: Seen) -> None:
    kept = {name: policy(seen, 0.4).sum(-1) for name, policy in BASELINES.items()}
    lengths = {name: set(found.flatten().tolist()) for name, found in kept.items()}
    assert [name for name, found in lengths.items() if len(found) > 1] == ["adakv"]


@pytest.mark.parametrize(("window", "weight"), [(70, 60.0), (32, 30.0), (500, 60.0)])
def test_corm_keeps_what_a_recent_row_gave_its_share(
    seen: Seen, window: int, weight: float
) -> None:
    live = corm(seen, window, weight)
    for layer, head, token in ((0, 0, 50), (1, 1, 120), (0, 1, 10), (1, 0, 3), (0, 0, 199)):
        hit = False
        for row in range(max(0, ROWS - window), ROWS):
            t = TOKENS - ROWS + row + 1
            own = seen.weights[layer, row, head * GROUP : (head + 1) * GROUP, token]
            hit |= bool((own >= weight / t).any())
        assert bool(live[layer, head, token]) == (hit or bool(protected(TOKENS)[token]))
    assert float(live.float().mean()) < 1


def test_scores_decide_within_a_budget() -> None:
    scores = torch.zeros(1, 1, 100)
    scores[0, 0, 40] = 1
    assert top(scores, 0.37)[0, 0, 40]
    assert not top(-scores, 0.9)[0, 0, 40]
