from __future__ import annotations

import torch

from kvkeep.quant.baselines.paper import HackPaper
from kvkeep.quant.codec import Place
from tests.quant.baselines.pages import page

PLACE = Place(0, False)


def test_rounding_depends_on_the_seed_and_the_page_alone() -> None:
    k, v = page()
    other = HackPaper()
    other.encode(*page(5), PLACE)
    assert HackPaper().encode(k, v, PLACE) == other.encode(k, v, PLACE)
    assert HackPaper(seed=1).encode(k, v, PLACE) != other.encode(k, v, PLACE)


def test_random_rounding_is_right_on_average_and_worse_each_time() -> None:
    k, v = page()
    keys = torch.stack([HackPaper(seed).rounded(k, v, PLACE)[0] for seed in range(64)])
    nearest = (HackPaper(stochastic=False).rounded(k, v, PLACE)[0] - k).norm()
    assert (keys.mean(0) - k).norm() < 0.3 * (keys[0] - k).norm()
    assert (keys[0] - k).norm() > 1.2 * nearest


def test_stored_sums_are_those_of_the_codes() -> None:
    for one in HackPaper().operands(*page()):
        assert torch.equal(one.sums[..., 0].int(), one.codes.int().sum(-1))
        assert one.codes.max() == 3
