from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kvkeep.inspect.page import page_errors, relative
from kvkeep.quant.codec import Float
from kvkeep.quant.hack import Hack
from kvkeep.types import Layout
from tests.inspect.test_watch import IDS, options


def test_errors_are_over_the_size_of_what_was_expected() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    found = torch.tensor([[3.0, 4.5], [0.0, 0.0]])
    assert relative(found, expected, 1).tolist() == [0.1, 0.0]
    assert relative(expected, expected, (0, 1)) == 0.0


def test_the_same_pages_have_no_error(tiny: dict[str, Path]) -> None:
    errors = page_errors(options(tiny["qwen2"]), Float(), IDS, 1)
    assert not np.any(errors.k_channels)
    assert not np.any(errors.attention_heads)


def test_fewer_bits_are_larger_errors_in_every_layer_and_head(tiny: dict[str, Path]) -> None:
    wide, narrow = (
        page_errors(options(tiny["qwen2"]), Hack(layout), IDS, 2)
        for layout in (Layout.K8V8, Layout.K2V2)
    )
    assert (narrow.codec, narrow.page, narrow.first_position) == ("k2v2", 2, 128)
    assert np.shape(narrow.k_channels) == (3, 2, 16)
    assert np.all(np.array(narrow.k_heads) > 4 * np.array(wide.k_heads))
    assert np.all(np.array(narrow.v_heads) > 4 * np.array(wide.v_heads))
    assert not np.any(np.array(narrow.v_heads_before)[0]), "no layer before the first is coded"
    assert np.all(np.array(narrow.v_heads_before)[1] > 0)
    assert np.sum(narrow.attention_heads) > np.sum(wide.attention_heads) > 0
