"""Sampling kernels: native against reference, a row alone against a row among others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kvkeep import ops
from kvkeep.errors import KernelInputError
from kvkeep.ops.layout import Drawn, DrawRow, SampleOps
from kvkeep.ops.reference_sample import ReferenceSample

kernels = pytest.mark.parametrize("kernel", ["avx512", "avx2", "portable"])
paths = pytest.mark.parametrize("kernel", ["avx512", "avx2", "portable", "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=("bf16", "f32"))
vocabs = pytest.mark.parametrize(
    "vocab", [1, 2, 15, 127, 128, 129, 511, 512, 513, 1000, 4096, 4099, 70_001]
)


def sample(kernel: ops.Kernel, threads: int = 2) -> SampleOps:
    if kernel != "reference" and kernel not in ops.available():
        pytest.skip(f"this CPU does not run {kernel}")
    return ops.select(kernel, threads).sample


def random(vocab: int, dtype: torch.dtype, seed: int = 1, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(vocab, generator=generator) * scale).to(dtype)


def row_of(logits: torch.Tensor, uniform: float, scale: float = 1.0) -> DrawRow:
    """Return a row that keeps every weight."""
    return DrawRow(logits, float(logits.max()), scale, 0.0, len(logits), uniform)


@paths
@dtypes
@vocabs
def test_the_largest_is_the_first_of_equals(
    kernel: ops.Kernel, dtype: torch.dtype, vocab: int
) -> None:
    native = sample(kernel)
    for seed in range(4):
        logits = random(vocab, dtype, seed)
        for place in {0, vocab // 3, vocab - 1}:
            logits[place] = 50.0
            logits[place:] = logits[place:].clamp(max=50.0)
            assert native.largest([logits]) == [(int((logits == 50.0).nonzero()[0]), 50.0)]
            logits[-1] = 50.0
            assert native.largest([logits]) == [(int((logits == 50.0).nonzero()[0]), 50.0)]
            logits[place] = logits[-1] = -math.inf
            top = float(logits.max())
            assert native.largest([logits])[0].logit == top


@paths
@dtypes
@vocabs
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_told(
    kernel: ops.Kernel, dtype: torch.dtype, vocab: int, bad: float
) -> None:
    native = sample(kernel)
    logits = torch.full((vocab,), -math.inf, dtype=dtype)
    assert native.largest([logits]) == [(0, -math.inf)]
    for place in {0, vocab // 2, vocab - 1}:
        broken = random(vocab, dtype)
        broken[place] = bad
        first, second = native.largest([broken, random(vocab, dtype)])
        assert not first.logit < math.inf
        assert math.isfinite(second.logit)


@kernels
@dtypes
@vocabs
def test_exact_weights_are_drawn_as_the_reference_draws_them(
    kernel: ops.Kernel, dtype: torch.dtype, vocab: int
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = -torch.randint(0, 4, (vocab,), generator=generator).to(dtype)
    top = float(logits.max())
    rows = [
        DrawRow(logits, top, 1.0, bound, ties, uniform)
        for bound in (0.0, 0.125, 0.25, 0.5, 1.0)
        for ties in sorted({0, 1, vocab // 2, vocab // 2 + 1, vocab})
        for uniform in (1e-9, 0.25, 0.4999, 0.75, 1 - 1e-9)
    ]
    assert sample(kernel).draw(rows) == ReferenceSample().draw(rows)


@paths
def test_a_draw_follows_its_definition(kernel: ops.Kernel) -> None:
    native = sample(kernel)
    logits = torch.tensor([0.0, -1.0, 0.0, -math.inf, -2.0])

    def draw(uniform: float, bound: float, ties: int) -> Drawn:
        return native.draw([DrawRow(logits, 0.0, 1.0, bound, ties, uniform)])[0]

    assert draw(0.1, 0.0, 5) == (0, 1.0, 2.75)
    assert draw(1.01 / 2.75, 0.0, 5) == (1, 0.5, 2.75)
    assert draw(1.51 / 2.75, 0.0, 5) == (2, 1.0, 2.75)
    assert draw(0.999, 0.0, 5) == (4, 0.25, 2.75)
    assert draw(0.999, 0.5, 1) == (2, 1.0, 2.0)
    assert draw(0.6, 1.0, 2) == (0, 1.0, 1.0)
    assert draw(0.6, 1.0, 0) == (-1, 0.0, 0.0)


@kernels
@dtypes
@vocabs
def test_weights_and_masses_match_the_reference(
    kernel: ops.Kernel, dtype: torch.dtype, vocab: int
) -> None:
    native, reference = sample(kernel), ReferenceSample()
    logits = random(vocab, dtype, vocab)
    logits[vocab // 2 + 1 :: 7] = -math.inf
    uniforms = np.random.default_rng(vocab).random(60)
    same = 0
    for scale in (0.7, 1.8, 40.0):
        for uniform in uniforms:
            row = row_of(logits, float(uniform), scale=scale)
            got, want = native.draw([row])[0], reference.draw([row])[0]
            assert got.mass == pytest.approx(want.mass, rel=2e-6)
            expected = 2.0 ** ((float(logits[got.token]) - row.top) * scale)
            assert got.weight == pytest.approx(expected, rel=1e-5)
            same += got.token == want.token
    assert same >= 3 * 60 - 2  # only rounding at a token's edge may tell them apart


@paths
def test_the_best_token_weighs_one_and_small_weights_stay_above_0(kernel: ops.Kernel) -> None:
    native = sample(kernel)
    for scale in (1e-3, 1.4427, 7.3, 144_269.5):
        for seed in range(20):
            logits = random(300, torch.float32, seed, scale=9.0)
            top = float(logits.max())
            drawn = native.draw([row_of(logits, 0.5, scale)._replace(bound=1.0)])[0]
            assert drawn == (int(logits.argmax()), 1.0, 1.0)
            logits[logits < top] = -math.inf
            best = int(logits.argmax())
            others = native.draw([row_of(logits, 0.5, scale)])[0]
            assert others.token == best
            rest = torch.cat([logits[:best], logits[best + 1 :]])
            floor = native.draw([row_of(rest, 0.5, scale)._replace(top=top)])[0]
            assert floor.weight == 2.0**-120
            assert floor.mass == 299 * 2.0**-120


@kernels
@dtypes
def test_a_draw_does_not_depend_on_threads_or_other_rows(
    kernel: ops.Kernel, dtype: torch.dtype
) -> None:
    vocab = 70_001
    rows = [row_of(random(vocab, dtype, i), (i + 0.5) / 9, scale=1.8) for i in range(9)]
    first = sample(kernel, 1).draw(rows)
    rows += [
        row._replace(bound=drawn.weight, ties=drawn.token)
        for row, drawn in zip(rows, first, strict=True)
    ]
    alone = sample(kernel, 1)
    single = [alone.draw([row])[0] for row in rows]
    best = [alone.largest([row.logits])[0] for row in rows]
    for threads in (1, 2, 3):
        native = sample(kernel, threads)
        for _ in range(5):
            assert native.draw(rows) == single
            assert native.largest([row.logits for row in rows]) == best


@dtypes
def test_instruction_sets_differ_by_rounding_only(dtype: torch.dtype) -> None:
    rows = [row_of(random(70_001, dtype, i), (i + 0.5) / 40, scale=1.8) for i in range(40)]
    drawn = [sample(kernel).draw(rows) for kernel in ops.available()]
    for others in drawn[1:]:
        tokens = [a.token == b.token for a, b in zip(drawn[0], others, strict=True)]
        assert sum(tokens) >= 38
        for one, other in zip(drawn[0], others, strict=True):
            assert one.mass == pytest.approx(other.mass, rel=5e-7)


@kernels
def test_rows_of_both_dtypes_go_together_and_bad_ones_are_refused(kernel: ops.Kernel) -> None:
    native = sample(kernel)
    wide, narrow = random(200, torch.float32), random(200, torch.bfloat16)
    pair = native.draw([row_of(wide, 0.3), row_of(narrow, 0.3)])
    assert pair == [native.draw([row_of(x, 0.3)])[0] for x in (wide, narrow)]
    assert native.draw([]) == []
    assert native.largest([]) == []
    for bad in (wide.half(), wide[:100], torch.zeros(200, 2)[:, 0], torch.zeros(200, 1)):
        with pytest.raises(KernelInputError, match="must be dense"):
            native.largest([wide, bad])
        with pytest.raises(KernelInputError, match="must be dense"):
            native.draw([row_of(wide, 0.3), row_of(wide, 0.3)._replace(logits=bad)])
