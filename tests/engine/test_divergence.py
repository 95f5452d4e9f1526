"""Divergence of two rows of logits, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvkeep.engine.divergence import divergence


def test_it_is_the_sum_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    shadow, served = rng.normal(0, 3, (2, 500))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (shadow, served))
    found = divergence(torch.from_numpy(shadow), torch.from_numpy(served))
    assert found is not None
    assert found.kl_nats == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-9)
    assert found.agrees == (p.argmax() == q.argmax())


def test_equal_rows_are_not_apart_and_a_constant_changes_nothing() -> None:
    row = torch.randn(300, generator=torch.Generator().manual_seed(1))
    assert divergence(row, row) == (0.0, True)
    shifted = divergence(row, row + 4)
    assert shifted is not None
    assert shifted.kl_nats < 1e-6


def test_the_most_likely_token_tells_whether_they_agree() -> None:
    found = divergence(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]))
    assert found is not None
    assert not found.agrees


def test_a_token_that_is_ruled_out_adds_nothing() -> None:
    row = torch.tensor([1.0, float("-inf"), 2.0])
    assert divergence(row, row) == (0.0, True)
    assert divergence(torch.zeros(3), row) is None, "not what the shadow gives weight to"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_is_not_compared(value: float) -> None:
    good, bad = torch.zeros(4), torch.tensor([0.0, value, 0.0, 0.0])
    assert divergence(good, bad) is None
    assert divergence(bad, good) is None
