"""Philox against the known answers of its authors, and the uniform numbers made of it."""

from __future__ import annotations

import numpy as np
import pytest

from kvkeep.engine.philox import Words, philox4x32, uniform

_ONES = 0xFFFF_FFFF


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (_ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0_A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    key: int, counter: tuple[int, int, int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x32(key, Words(*counter)) == expected


def test_uniform_is_spread_and_never_at_an_end() -> None:
    values = np.array([uniform(7, 0, position) for position in range(4000)])
    assert values.min() > 0.0
    assert values.max() < 1.0
    assert np.abs(np.histogram(values, 20, (0, 1))[0] - 200).max() < 70


def test_every_coordinate_matters_and_negative_seeds_are_distinct() -> None:
    draws = {
        uniform(seed, index, position, draw)
        for seed in (0, 1, -1, 2**40, 2**63)
        for index in (0, 1)
        for position in (0, 1, 4096)
        for draw in (0, 1)
    }
    assert len(draws) == 5 * 2 * 3 * 2
