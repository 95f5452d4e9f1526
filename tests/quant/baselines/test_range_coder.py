from __future__ import annotations

import math

import numpy as np
import pytest

from kvkeep.quant.baselines.range_coder import TOTAL_BITS, decode, encode, table_of


@pytest.mark.parametrize("levels", [2, 5, 15, 255])
@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_symbols_come_back(levels: int, count: int) -> None:
    rng = np.random.default_rng(count)
    tables = [table_of(rng.random(levels) ** 8) for _ in range(count)]
    symbols = rng.integers(0, levels, count).tolist()
    assert decode(encode(symbols, tables), tables) == symbols


def test_the_length_is_what_the_tables_say() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([900.0, 60, 30, 10])
    symbols = rng.choice(4, 20_000, p=counts / counts.sum()).tolist()
    table = table_of(counts)
    blob = encode(symbols, [table] * len(symbols))
    bits = sum(TOTAL_BITS - math.log2(table[s + 1] - table[s]) for s in symbols)
    assert bits / 8 <= len(blob) <= bits / 8 * 1.001 + 4


def test_the_rarest_and_the_surest_symbols_come_back() -> None:
    table = table_of(np.array([1e9, 0, 0]))
    assert table[-1] == 1 << TOTAL_BITS
    symbols = [0] * 3000 + [2] * 50 + [1] + [0] * 3000
    blob = encode(symbols, [table] * len(symbols))
    assert decode(blob, [table] * len(symbols)) == symbols
    assert len(encode([0] * 6000, [table] * 6000)) <= 4
