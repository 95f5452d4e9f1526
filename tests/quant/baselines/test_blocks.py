from __future__ import annotations

import struct

import numpy as np
import torch

from kvkeep.quant.baselines.blocks import Q4, Q8
from kvkeep.quant.codec import Place
from tests.quant.baselines.pages import page


def test_a_block_of_eight_bits_is_a_scale_and_its_rounded_numbers() -> None:
    k, v = page()
    x = k[0, 0, :32].float().numpy()
    block = Q8().encode(k, v, Place(0, False))[:34]
    scale = np.float32(np.abs(x).max() / 127)
    assert struct.unpack("<e", block[:2])[0] == np.float16(scale)
    exact = x.astype(np.float64) / scale
    assert np.all(np.abs(np.frombuffer(block[2:], np.int8) - exact) <= 0.5001)


def test_a_block_of_four_bits_has_its_largest_magnitude_at_minus_eight() -> None:
    k, v = page()
    k[0, 0, :32] = torch.linspace(-1, 1, 32)
    k[0, 0, 20] = 4.0
    block = Q4().encode(k, v, Place(0, False))[:18]
    assert struct.unpack("<e", block[:2])[0] == -0.5
    codes = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    assert codes[20] == 0
    assert codes[0] == 10
    assert codes[31] == 6
