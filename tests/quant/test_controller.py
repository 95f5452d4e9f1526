"""The choice of a codec: from the request and its tenant's setting alone."""

from __future__ import annotations

import pytest

from kvkeep.quant.controller import ByLength, Fixed


@pytest.mark.parametrize(
    ("length", "may_code", "chosen"),
    [(1, True, "kept"), (100, True, "kept"), (101, True, "k4v2"), (101, False, "kept")],
)
def test_long_requests_are_coded_unless_their_tenant_says_no(
    length: int, may_code: bool, chosen: str
) -> None:
    assert ByLength("kept", "k4v2", 100).choose(length, may_code=may_code) == chosen


def test_one_form_leaves_no_choice() -> None:
    assert {Fixed("k2v2").choose(n, may_code=False) for n in (1, 10**6)} == {"k2v2"}
