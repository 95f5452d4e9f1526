"""Prescribed masks: so much of each head, its latest and first tokens always."""

from __future__ import annotations

import numpy as np
import pytest

from bench.prescribed import OWN, RECENT, SINKS, Prescribed, scaled
from kvkeep.eviction.corm import unpack
from kvkeep.quant.codec import Float, KVShape
from kvkeep.types import PAGE_TOKENS, Layout

SHAPE = KVShape(3, 2, 32, Layout.BF16)
SHARES = np.array([0.1, 0.9, 0.4, 0.2], np.float32)


@pytest.mark.parametrize("mean", [0.1, 0.25, 0.8])
def test_shares_are_scaled_to_a_mean_and_keep_their_order(mean: float) -> None:
    found = scaled(SHARES, mean)
    assert found.mean() == pytest.approx(mean, abs=1e-4)
    assert found.max() <= 1.0
    assert (np.argsort(found, kind="stable") == np.argsort(SHARES, kind="stable")).all() or (
        found.max() == 1.0
    )


def test_a_prompt_keeps_a_quarter_and_its_ends_and_nothing_goes_later() -> None:
    evictor, tokens = Prescribed(SHARES), 4_000
    watch = evictor.watch(tokens)
    assert watch.first == tokens - OWN
    state = evictor.new_state(Float().page_spec(SHAPE), watch)
    masks = evictor.keep(state, tokens - 1)
    pages = len(masks)
    live = np.moveaxis(unpack(masks, (3, pages, 2, PAGE_TOKENS)), 2, 1).reshape(3, 2, -1)
    assert live[..., :tokens].mean() == pytest.approx(0.25, abs=0.01)
    assert live[..., :SINKS].all()
    assert live[..., tokens - RECENT :].all()
    by_head = live[..., SINKS : tokens - RECENT].mean(-1).ravel()
    assert by_head.max() > 3 * by_head.min()
    state.masks = masks
    assert evictor.keep(state, tokens) is masks
    again = Prescribed(SHARES).keep(evictor.new_state(Float().page_spec(SHAPE), watch), tokens - 1)
    assert np.array_equal(again, masks)
