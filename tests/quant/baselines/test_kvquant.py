from __future__ import annotations

import torch

from kvkeep.quant.baselines.kvquant import KvQuant
from kvkeep.quant.codec import Place
from tests.quant.baselines.pages import page, sample


def test_outliers_come_back_as_they_were_and_stretch_no_range() -> None:
    codec, (k, v) = KvQuant(sample()), page(3)
    plain = codec.rounded(k, v, Place(1, False))
    k[1, 9, 5], v[1, 9, 5] = 1000.0, -1000.0
    keys, values = codec.rounded(k, v, Place(1, False))
    assert keys[1, 9, 5] == 1000.0
    assert values[1, 9, 5] == -1000.0
    assert float((values[1, 9] - plain[1][1, 9]).abs().sort().values[:-2].max()) < 1


def test_a_sequences_first_token_stays_in_sixteen_bits() -> None:
    codec, (k, v) = KvQuant(sample()), page(3)
    keys, values = codec.rounded(k, v, Place(1, True))
    assert torch.equal(keys[:, 0], k[:, 0].float())
    assert torch.equal(values[:, 0], v[:, 0].half().float())
    later = codec.rounded(k, v, Place(1, False))
    assert not torch.equal(later[0][:, 0], k[:, 0].float())
    assert torch.equal(later[0][:, 1:], keys[:, 1:])


def test_layers_have_levels_of_their_own() -> None:
    learnt = sample()
    learnt[1] = [(k * 5, v) for k, v in learnt[1]]
    codec, (k, v) = KvQuant(learnt), page(3)
    errors = [float((codec.rounded(k, v, Place(layer, False))[0] - k).norm()) for layer in range(2)]
    assert errors[1] > 1.5 * errors[0]
