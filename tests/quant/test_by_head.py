from __future__ import annotations

import numpy as np
import pytest
import torch

from kvkeep.errors import ConfigError, NonFiniteKV
from kvkeep.ops.codes import tile_bytes
from kvkeep.quant.by_head import ByHead
from kvkeep.quant.codec import KVShape, Place
from kvkeep.quant.hack import Hack
from kvkeep.types import PAGE_TOKENS, Layout

DIM = 64
LAYOUTS = (
    (Layout.K4V2, Layout.K2V2, Layout.K4V2),
    (Layout.K2V2, Layout.K2V2, Layout.K2V2),
)
SHAPE = KVShape(2, 3, DIM, Layout.BF16)


def made() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    k, v = (torch.randn((3, PAGE_TOKENS, DIM), generator=draw).bfloat16() for _ in range(2))
    return k, v


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_head_is_stored_as_its_layout_stores_it(layer: int, first: bool) -> None:
    codec, (k, v), place = ByHead(LAYOUTS), made(), Place(layer, first)
    tiles = codec.encode(k, v, place)
    back = codec.decode(tiles, SHAPE, place)
    for head, layout in enumerate(LAYOUTS[layer]):
        one = Hack(layout)
        own = one.encode(k[head : head + 1], v[head : head + 1], place)
        assert np.array_equal(tiles[head, : own.shape[1]], own[0])
        assert not tiles[head, own.shape[1] :].any()
        for found, expected in zip(back, one.decode(own, SHAPE, place), strict=True):
            assert torch.equal(found[head], expected[0])


def test_a_page_has_the_bytes_of_its_tiles() -> None:
    spec = ByHead(LAYOUTS).page_spec(SHAPE)
    few, many = (tile_bytes(layout, DIM) for layout in (Layout.K2V2, Layout.K4V2))
    sinks = tile_bytes(Layout.K2V2, DIM, first=True) - few
    assert spec.page_bytes == 4 * few + 2 * many
    assert spec.first_page_bytes == spec.page_bytes + 6 * sinks
    assert (spec.layout, spec.tile_bytes) == (Layout.BY_HEAD, many)
    assert spec.usual_layout is Layout.K2V2
    assert spec.tile_sizes().tolist() == [[many, few, many], [few] * 3]
    named = [spec.coded_layouts(layer) for layer in (0, 1)]
    assert [None if one is None else tuple(one) for one in named] == list(LAYOUTS)


def test_the_name_tells_every_choice_and_window_apart() -> None:
    other = (LAYOUTS[1], LAYOUTS[0])
    joined = ((*LAYOUTS[0], *LAYOUTS[1]),)
    names = {ByHead(one).name for one in (LAYOUTS, other, joined)} | {ByHead(LAYOUTS, 256).name}
    assert len(names) == 4
    assert ByHead(LAYOUTS).name == ByHead([list(layer) for layer in LAYOUTS]).name


def test_another_model_is_refused() -> None:
    for shape in (SHAPE._replace(num_layers=3), SHAPE._replace(num_kv_heads=2)):
        with pytest.raises(ConfigError, match="kv: bits are given for 2 layers"):
            ByHead(LAYOUTS).page_spec(shape)


def test_a_value_that_is_not_finite_names_its_head_in_the_layer() -> None:
    k, v = made()
    v[2, 5, 5] = float("nan")
    with pytest.raises(NonFiniteKV) as caught:
        ByHead(LAYOUTS).encode(k, v, Place(0, False))
    assert (caught.value.what, caught.value.head) == ("V", 2)
