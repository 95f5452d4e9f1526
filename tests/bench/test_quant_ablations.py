"""The ablations of coded pages: the published product is exact, forms differ as they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import quant_ablations as bench
from bench.harness import MIN_PAIRS
from bench.quant_ablations import PAPER, PLAIN, SERVED, Form, Heads, Work
from bench.quant_paper import Operand, eight_bits, paper_step, product
from kvkeep.quant.baselines.base import shape_of
from kvkeep.quant.baselines.paper import HackPaper
from kvkeep.quant.codec import Place
from kvkeep.quant.hack import Hack, hadamard
from kvkeep.types import Layout


def meant(x: Operand) -> torch.Tensor:
    """Return float64 what codes stand for."""
    return x.scale.double() * x.codes + x.least


@pytest.mark.parametrize("stored", [True, False])
def test_a_product_of_codes_is_the_product_of_what_they_stand_for(stored: bool) -> None:
    torch.manual_seed(0)
    a, b = eight_bits(torch.randn(3, 5, 64)), eight_bits(torch.randn(3, 7, 64))
    found = product(a, b, stored=stored)
    torch.testing.assert_close(found.double(), meant(a) @ meant(b).mT, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("open_block", [True, False])
def test_the_published_step_is_attention_over_decoded_pages(stored: bool, open_block: bool) -> None:
    step = paper_step(2, 256, 128)
    q = torch.randn(2, 3, 128)
    found = step.attend(q, stored=stored, open_block=open_block)
    k = meant(step.k).transpose(1, 2).flatten(2)
    v = meant(step.v).transpose(2, 3).flatten(1, 2)
    k, v = torch.cat([k, step.open_k], 1), torch.cat([v, step.open_v], 1)
    weights = (q.double() @ k.mT / 128**0.5).softmax(-1)
    off = (found - weights @ v).norm() / (weights @ v).norm()
    assert off < (0.03 if open_block else 0.2)  # bytes of operands; two bits of the open block


def made(tokens: int = 256, dim: int = 64) -> Heads:
    draw = torch.Generator().manual_seed(0)
    return Heads(
        torch.randn(tokens, 4, dim, generator=draw), *torch.randn(2, 2, tokens, dim, generator=draw)
    )


def test_the_served_form_is_the_codec_that_is_served() -> None:
    heads, codec = made(64), Hack(Layout.K2V2)
    turn = codec.rotation(shape_of(heads.k))
    assert turn is not None
    tiles = codec.encode(heads.k @ turn.k, heads.v, Place(0, first=False))
    k, v = codec.decode(tiles, shape_of(heads.k), Place(0, first=False))
    found = SERVED.coded(heads)
    torch.testing.assert_close(found.k, k @ turn.q.T)
    torch.testing.assert_close(found.v, v)


def test_the_published_form_is_the_baseline() -> None:
    heads, baseline = made(64), HackPaper(stochastic=False)
    blob = baseline.encode(heads.k, heads.v, Place(0, first=False))
    k, v = baseline.decode(blob, shape_of(heads.k), Place(0, first=False))
    found = PAPER.coded(heads)
    for back, other, x in ((found.k, k, heads.k), (found.v, v, heads.v)):
        assert (back - x).norm() == pytest.approx(float((other - x).norm()), rel=0.03)
        assert (back - other).norm() < 0.1 * x.norm()  # scales are rounded in another order
    assert PAPER.bytes_ratio(64) == len(blob) / (2 * 2 * 2 * 64 * 64)


def test_bytes_are_those_of_tiles() -> None:
    assert SERVED.bytes_ratio(128) == pytest.approx(80 / 512)
    assert PAPER.bytes_ratio(128) == pytest.approx(84 / 512)
    assert [replace(SERVED, page=n).bytes_ratio(128) * 512 for n in (32, 64, 128)] == [96, 80, 76]


def test_norms_that_are_stored_apart_are_no_loss() -> None:
    one = torch.nn.functional.normalize(torch.randn(2, 1, 64), dim=2)
    values = torch.tensor([1.0, -1.0]).repeat(32) / 8
    norms = 2.0 ** torch.arange(-32, 32).repeat(2)[: 2 * 64].view(2, 64, 1)
    heads = Heads(torch.randn(64, 4, 64), one * norms, values.expand(2, 64, 64) * norms)
    apart = replace(PLAIN, norms=True)
    found, without = apart.coded(heads), PLAIN.coded(heads)
    torch.testing.assert_close(found.k, heads.k, rtol=0.02, atol=0)
    torch.testing.assert_close(found.v, heads.v, rtol=0.02, atol=0)
    off = (without.k - heads.k).norm(dim=2) / heads.k.norm(dim=2)
    assert off.max() > 1
    assert apart.bytes_ratio(128) == pytest.approx(84 / 512)


def test_values_may_be_rotated_before_they_are_coded() -> None:
    basis = hadamard(64)
    values = (basis.q[:, 1:2] + 3 * basis.q[:, 2:3]).T.expand(2, 64, 64)
    heads = made(64)._replace(v=values)
    rotated = replace(SERVED, rotate_values=True)
    torch.testing.assert_close(rotated.coded(heads).v, values)
    assert (SERVED.coded(heads).v - values).norm() > 0.1 * values.norm()
    torch.testing.assert_close(rotated.coded(heads).k, SERVED.coded(heads).k)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (replace(SERVED, bits=4), SERVED),
        (replace(PLAIN, page=32), replace(PLAIN, page=128)),
        (PLAIN, replace(PLAIN, stochastic=True)),
        (PAPER, replace(PAPER, again=True)),
    ],
)
def test_errors_tell_forms_apart(better: Form, worse: Form) -> None:
    layers = [made(384)]
    assert 0 < bench.error_of(better, layers) < bench.error_of(worse, layers)


def test_pages_as_they_are_have_no_error() -> None:
    heads = made(384)
    same = bench.attended(heads, heads, 128, 320)
    assert same.shape == (bench.ROWS, 4, 64)
    torch.testing.assert_close(bench.attended(heads, heads, 0, 0), same)


def test_what_is_left_out_is_a_share_of_what_it_takes_with_it() -> None:
    share, row = bench.compared(Work("x", "y", 64, lambda: 2.0, lambda: 2.5), MIN_PAIRS)
    assert share == (0.25, 0.25, 0.25, MIN_PAIRS)
    assert row["with it, us"] == 2e6
    assert row["takes more"] == 0.25
