"""How far a coded page is from one computed and kept in the model's dtype: numbers, never text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from kvkeep.engine.options import EngineOptions
from kvkeep.errors import EngineError
from kvkeep.inspect.watch import watch
from kvkeep.quant.codec import Codec, Float
from kvkeep.types import PAGE_TOKENS

_LEAST: Final = 1e-12
"""Below it a norm counts as none."""
_DIGITS: Final = 6


class PageErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of a coded page, each over the size of the same in 16 bits: 0.1 is a tenth of it.

    Keys are compared as the model computes them, after RoPE, whatever a codec turns them by.
    """

    model: str
    digest: str
    """Of the model, in hexadecimal."""
    dtype: str
    codec: str
    page: int
    first_position: int
    tokens: int
    """Of the prompt."""
    k_channels: list[list[list[float]]]
    """[L][Hkv][D], root mean squares over the page's tokens, as are those of `v_channels`."""
    v_channels: list[list[list[float]]]
    k_heads: list[list[float]]
    """[L][Hkv] over tokens and channels, as is `v_heads`."""
    v_heads: list[list[float]]
    k_heads_before: list[list[float]]
    """[L][Hkv] of what was computed over coded pages before this one was coded, as is the next."""
    v_heads_before: list[list[float]]
    attention_heads: list[list[float]]
    """[L][Hq] of attention's output at the prompt's last token, over all its pages."""


def page_errors(options: EngineOptions, codec: Codec, ids: Sequence[int], page: int) -> PageErrors:
    """Run a prompt on pages of the model's dtype and on coded ones, and compare one page."""
    plain, coded = (watch(options, one, ids, page) for one in (Float(), codec))
    info = plain.info
    errors = PageErrors(
        model=info.name,
        digest=info.digest,
        dtype=info.dtype,
        codec=codec.name,
        page=page,
        first_position=page * PAGE_TOKENS,
        tokens=len(ids),
        k_channels=relative(coded.stored_k, plain.k, 2).tolist(),
        v_channels=relative(coded.stored_v, plain.v, 2).tolist(),
        k_heads=relative(coded.stored_k, plain.k, (2, 3)).tolist(),
        v_heads=relative(coded.stored_v, plain.v, (2, 3)).tolist(),
        k_heads_before=relative(coded.k, plain.k, (2, 3)).tolist(),
        v_heads_before=relative(coded.v, plain.v, (2, 3)).tolist(),
        attention_heads=relative(coded.out, plain.out, 2).tolist(),
    )
    if not all(np.isfinite(x).all() for x in (errors.k_channels, errors.v_channels)):
        raise EngineError(
            "K or V of the page isn't finite in the model's dtype: try --dtype float32, or check"
            " the model's weights"
        )
    return errors


def relative(
    found: torch.Tensor, expected: torch.Tensor, axes: int | tuple[int, ...]
) -> NDArray[np.float64]:
    """Return the norm over `axes` of a difference over that of what was expected; 0 for 0 of 0."""
    gap, size = ((x.double().square().sum(axes)).sqrt() for x in (found - expected, expected))
    ratio = torch.where(gap > 0, gap / size.clamp_min(_LEAST), 0.0)
    return np.round(ratio.numpy(), _DIGITS)
