from __future__ import annotations

import pytest
import torch

from kvkeep.errors import NonFiniteKV
from kvkeep.ops.codes import CODE_BITS, SINK_TOKENS, coded_tile_bytes, partition_channels
from kvkeep.quant.codec import KVShape, Place
from kvkeep.quant.hack import Hack, affine, fitted, hadamard, quantise
from kvkeep.types import PAGE_TOKENS, Layout

CODED = list(CODE_BITS)
DIM = 96
PART = partition_channels(DIM)


def shape_of(dim: int = DIM, heads: int = 3) -> KVShape:
    return KVShape(1, heads, dim, Layout.BF16)


def made(*, spread: float = 1.0, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    k, v = (torch.randn((3, PAGE_TOKENS, dim), generator=draw) * spread for _ in range(2))
    return (k + 3 * spread * torch.randn((3, 1, dim), generator=draw)).bfloat16(), v.bfloat16()


def stored(
    layout: Layout, k: torch.Tensor, v: torch.Tensor, *, first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    codec, place = Hack(layout), Place(0, first)
    return codec.decode(codec.encode(k, v, place), shape_of(k.shape[2]), place)


def half_steps(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Half a step of the codes, and what rounding both ends to bfloat16 may add.

    A fitted range is narrower: its steps are smaller, and what lies outside is farther.
    """
    low, high = torch.aminmax(x.float(), dim=axis, keepdim=True)
    ends = torch.maximum(low.abs(), high.abs())
    beyond = 1.0 if bits == 2 and axis == 1 else 0.5
    return (high - low) / ((1 << bits) - 1) * beyond + (high - low + ends) * 2**-8


@pytest.mark.parametrize("layout", CODED, ids=lambda layout: layout.name)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-30, 1e4])
def test_a_value_comes_back_within_half_a_step(layout: Layout, first: bool, spread: float) -> None:
    k, v = made(spread=spread)
    keys, values = stored(layout, k, v, first=first)
    bits, begin = CODE_BITS[layout], SINK_TOKENS if first else 0
    assert torch.all((keys - k).abs()[:, begin:] <= half_steps(k[:, begin:], bits.k, 1))
    parts = v.view(3, PAGE_TOKENS, -1, PART)
    found = values.view(parts.shape)
    assert torch.all((found - parts).abs()[:, begin:] <= half_steps(parts, bits.v, 3)[:, begin:])
    assert not torch.equal(keys[:, begin:], k[:, begin:].float())


def test_a_fitted_range_is_closer_on_the_whole_than_its_ends() -> None:
    k = made()[0].float()
    errors = [
        (make(k, 2, 1).scale * quantise(k, make(k, 2, 1), 2) + make(k, 2, 1).least - k).norm()
        for make in (fitted, affine)
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_leaves_scores_as_they_are(dim: int, dtype: torch.dtype) -> None:
    q, k = (m.to(dtype).double() for m in hadamard(dim))
    assert torch.equal(q @ k.T, torch.eye(dim, dtype=torch.float64))
    size = dim & -dim
    assert torch.equal((k != 0).sum(0), torch.full((dim,), size))


def test_whether_keys_are_rotated_is_part_of_the_name() -> None:
    turned, plain = Hack(Layout.K4V2), Hack(Layout.K4V2, rotate=False)
    assert (turned.name, plain.name) == ("k4v2", "k4v2-plain")
    assert Hack(Layout.K4V2, 256).name == "k4v2-w256", "so is the window: bits follow from it"
    assert turned.rotation(shape_of()) is not None
    assert plain.rotation(shape_of()) is None


@pytest.mark.parametrize("layout", CODED, ids=lambda layout: layout.name)
def test_sinks_stay_as_they_are_and_stretch_no_scale(layout: Layout) -> None:
    k, v = made()
    k[:, :SINK_TOKENS] *= 1000
    v[:, :SINK_TOKENS] *= 1000
    keys, values = stored(layout, k, v, first=True)
    assert torch.equal(keys[:, :SINK_TOKENS], k[:, :SINK_TOKENS].float())
    assert torch.equal(values[:, :SINK_TOKENS], v[:, :SINK_TOKENS].float())
    assert torch.all((keys - k)[:, SINK_TOKENS:].abs() < 3)
    codes = Hack(layout).codes(k, v, first=True)
    for part in (codes.k[:, :SINK_TOKENS], codes.v[:, :SINK_TOKENS]):
        assert not part.any()
    assert not codes.v_scale[..., :SINK_TOKENS].any()
    assert not codes.v_min[..., :SINK_TOKENS].any()


@pytest.mark.parametrize("layout", CODED, ids=lambda layout: layout.name)
@pytest.mark.parametrize("value", [0.0, -0.0, 3.140625, -1e4, 2.0**-133, 1e38])
def test_what_is_constant_comes_back_exactly(layout: Layout, value: float) -> None:
    k, v = (torch.full((2, PAGE_TOKENS, DIM), value).bfloat16() for _ in range(2))
    keys, values = stored(layout, k, v)
    assert torch.equal(keys, k.float())
    assert torch.equal(values, v.float())


@pytest.mark.parametrize("layout", CODED, ids=lambda layout: layout.name)
def test_an_outlier_harms_its_own_channel_or_token_alone(layout: Layout) -> None:
    k, v = made()
    plain = stored(layout, k, v)
    k[1, 9, 5] = v[1, 9, 5] = 1e4
    keys, values = stored(layout, k, v)
    assert keys[1, 9, 5] == pytest.approx(1e4, rel=0.01)
    assert values[1, 9, 5] == pytest.approx(1e4, rel=0.01)
    keys[1, :, 5] = plain[0][1, :, 5]
    values[1, 9, :PART] = plain[1][1, 9, :PART]
    assert torch.equal(keys, plain[0])
    assert torch.equal(values, plain[1])


@pytest.mark.parametrize("layout", CODED, ids=lambda layout: layout.name)
def test_a_range_of_denormals_counts_as_none(layout: Layout) -> None:
    k, v = made(spread=1e-40)
    keys, values = stored(layout, k.float(), v.float())
    assert torch.all((keys - k).abs() < 1e-38)
    assert torch.all((values - v).abs() < 1e-38)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("token", [1, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["K", "V"])
def test_a_value_that_is_not_finite_names_its_head(
    what: str, bad: float, token: int, first: bool
) -> None:
    k, v = made()
    (k if what == "K" else v)[2, token, 7] = bad
    with pytest.raises(NonFiniteKV, match=f"^{what} of KV head 2 isn't finite") as caught:
        Hack(Layout.K2V2).encode(k, v, Place(0, first))
    assert (caught.value.what, caught.value.head) == (what, 2)


@pytest.mark.parametrize("layout", CODED, ids=lambda layout: layout.name)
def test_tiles_have_the_size_of_the_spec(layout: Layout) -> None:
    codec, (k, v) = Hack(layout), made()
    spec = codec.page_spec(shape_of())
    assert codec.encode(k, v, Place(0, False)).shape == (3, spec.tile_bytes)
    assert codec.encode(k, v, Place(0, True)).shape == (3, spec.first_tile_bytes)
    assert spec.tile_bytes == coded_tile_bytes(layout, DIM) < spec.first_tile_bytes
    assert (spec.layout, codec.name) == (layout, layout.name.lower())
    assert codec.folds(shape_of()) == ()
