"""What is sooner there: sent behind a prompt's pages, or computed a second time."""

from __future__ import annotations

import pytest

from kvkeep.engine.speeds import Speeds

SPEEDS = Speeds(link_bytes_per_s=1e6, token_s=0.01)
"""A token is computed while 10 kB are sent."""


@pytest.mark.parametrize(
    ("pages_bytes", "rows_bytes", "pays"),
    [
        (0, 1_100_000, True),  # 1.1 s, all but .1 while the prompt is computed; .5 s computed again
        (1_000_000, 499_000, True),  # behind its pages, as late as computing takes
        (1_000_000, 501_000, False),
        (5_000_000, 499_000, True),  # the pages are late whatever becomes of the rows
        (5_000_000, 501_000, False),
        (0, 1_501_000, False),
    ],
)
def test_rows_are_sent_where_they_come_no_later_than_they_are_computed(
    pages_bytes: float, rows_bytes: float, pays: bool
) -> None:
    assert SPEEDS.rows_pay(100, 50, pages_bytes, rows_bytes) is pays


@pytest.mark.parametrize("tokens", [1, 64, 127])
def test_of_a_prompt_of_rows_alone_the_length_decides_nothing(tokens: int) -> None:
    assert SPEEDS.rows_pay(tokens, tokens, 0.0, 19_999.0 * tokens)
    assert not SPEEDS.rows_pay(tokens, tokens, 0.0, 20_001.0 * tokens)
