from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from kvkeep.shield.drbg import Stream, derive

KEY = bytes(range(32))


def test_the_bytes_are_those_of_aes_in_counter_mode() -> None:
    expected = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(5000))
    stream = Stream(KEY)
    assert b"".join(stream.take(n) for n in (1, 2, 0, 1000, 1997, 2000)) == expected


def test_purposes_are_told_apart_by_their_parts() -> None:
    purposes = [("k", 1, 2), ("k", 12), ("k", 1, 2, ""), ("v", 1, 2), ("k1", 2)]
    assert len({derive(KEY, *purpose) for purpose in purposes}) == len(purposes)
    assert derive(KEY, "k", 1) != derive(bytes(32), "k", 1)


@pytest.mark.parametrize("limit", [2, 3, 80, 128, 40_000, 65_536])
def test_every_number_below_a_limit_is_as_likely(limit: int) -> None:
    stream, draws = Stream(KEY), 40_000
    halves = Counter(stream.below(limit) * 2 // limit for _ in range(draws))
    assert set(halves) == {0, 1}
    low = (limit + 1) // 2 / limit  # of an odd limit the middle counts as low
    assert abs(halves[0] / draws - low) < 4 * 0.5 / draws**0.5


def test_what_would_favour_small_numbers_is_drawn_again() -> None:
    stream, draws = Stream(KEY), 30_000
    # 2 ** 16 = 40,000 + 25,536: without rejection numbers below 25,536 were twice as likely.
    share = sum(stream.below(40_000) < 25_536 for _ in range(draws)) / draws
    assert abs(share - 25_536 / 40_000) < 4 * 0.5 / draws**0.5


def test_permutations_are_ones_and_all_are_as_likely() -> None:
    stream = Stream(KEY)
    assert sorted(stream.permutation(128).tolist()) == list(range(128))
    draws = 12_000
    seen = Counter(tuple(stream.permutation(4).tolist()) for _ in range(draws))
    assert len(seen) == 24
    expected = draws / 24
    assert sum((n - expected) ** 2 / expected for n in seen.values()) < 49.7  # chi2, 23: p = 0.001


def test_signs_and_normals_have_their_moments() -> None:
    stream = Stream(KEY)
    signs = stream.signs(20_001)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / 20_001**0.5
    normals = stream.normals(20_001)
    assert len(normals) == 20_001
    assert abs(normals.mean()) < 4 / 20_001**0.5
    assert abs(normals.std() - 1) < 0.02
    assert abs((normals**4).mean() - 3) < 0.35
