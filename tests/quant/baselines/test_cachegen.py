from __future__ import annotations

import pytest
import torch

from kvkeep.quant.baselines.cachegen import CacheGen, Levels, levels_of
from kvkeep.quant.codec import Place
from tests.quant.baselines.pages import page, sample


@pytest.mark.parametrize(
    ("layer", "levels"),
    [(0, (255, 15)), (1, (15, 5)), (19, (15, 5)), (20, (7, 5)), (29, (7, 5))],
)
def test_levels_depend_on_the_third_of_the_layers(layer: int, levels: tuple[int, int]) -> None:
    assert levels_of(layer, 30) == Levels(*levels)


def test_a_groups_first_key_is_finer_than_the_rest() -> None:
    k, v = page(3)
    keys, _ = CacheGen(sample()).rounded(k, v, Place(2, False))
    error = (keys - k).abs()
    first = torch.arange(64) % 10 == 0
    assert error[:, first].mean() < error[:, ~first].mean() / 4
    assert error[:, first].max() <= k.abs().max() / 254 * 1.01


def test_tables_of_the_right_sample_make_shorter_streams() -> None:
    k, v = page(3)
    fitting, other = CacheGen(sample()), CacheGen([[(-k * 8, v)]] * 3)
    sizes = [len(codec.encode(k, v, Place(1, False))) for codec in (fitting, other)]
    assert sizes[0] < 0.9 * sizes[1]
