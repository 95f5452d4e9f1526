from __future__ import annotations

import pytest
import torch

from kvkeep.engine.turning import Turning
from kvkeep.ops import select
from kvkeep.quant.hack import hadamard

OPS = select("auto", 1)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_scores_of_what_is_turned_are_those_of_what_is_not(dim: int) -> None:
    turning = Turning(OPS, hadamard(dim), torch.float32)
    q, k = random(5, 4, dim), random(7, 2, dim)
    turned = torch.einsum("thd,sd->ths", turning.queries(q), turning.keys(k)[:, 1])
    plain = torch.einsum("thd,sd->ths", q, k[:, 1])
    assert torch.allclose(turned, plain, atol=1e-4)
    assert not torch.allclose(turning.keys(k), k, atol=0.1)


def test_a_rows_bits_do_not_depend_on_the_others() -> None:
    turning = Turning(OPS, hadamard(64), torch.bfloat16)
    rows = random(9, 6, 64).bfloat16()
    strided = rows[:, 1:3]
    alone = torch.cat([turning.keys(strided[i : i + 1]) for i in range(9)])
    assert torch.equal(turning.keys(strided), alone)
    assert torch.equal(turning.queries(rows)[4], turning.queries(rows[4:5])[0])


def test_without_a_rotation_nothing_is_touched() -> None:
    turning, x = Turning(OPS, None, torch.bfloat16), random(3, 2, 64)
    assert turning.queries(x) is x
    assert turning.keys(x) is x
