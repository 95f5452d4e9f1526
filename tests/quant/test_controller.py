"""The choice of a codec: from the request and its tenant's setting alone."""

from __future__ import annotations

import pytest

from kvkeep.quant.controller import ByLength, ByLink, Fixed


@pytest.mark.parametrize(
    ("prompt", "answer", "may_code", "chosen"),
    [
        (1, 0, True, "kept"),
        (1000, 24, True, "kept"),
        (1000, 25, True, "k4v2"),
        (1000, 25, False, "kept"),
        (20, 100_000, True, "kept"),
        (1024, 100_000, True, "k4v2"),
    ],
    ids=str,
)
def test_long_requests_are_coded_unless_their_tenant_says_no(
    prompt: int, answer: int, may_code: bool, chosen: str
) -> None:
    assert ByLength(("k4v2", "kept"), 1024).choose(prompt, answer, may_code=may_code) == chosen


def test_one_form_leaves_no_choice() -> None:
    assert {Fixed(("k2v2",)).choose(n, n, may_code=False) for n in (1, 10**6)} == {"k2v2"}


FORMS = ("k2v2", "k4v4", "kept")


@pytest.mark.parametrize(("floor", "chosen"), list(enumerate([*FORMS, "kept", "kept"])))
def test_a_tenant_that_stepped_back_has_so_many_more_bits(floor: int, chosen: str) -> None:
    assert Fixed(FORMS).choose(9, 9, may_code=True, floor=floor) == chosen
    by_length = ByLength(FORMS, 100)
    assert by_length.choose(99, 9, may_code=True, floor=floor) == chosen
    assert by_length.choose(9, 9, may_code=True, floor=floor) == "kept"


@pytest.mark.parametrize(
    ("prompt", "link_bytes_per_s", "may_code", "chosen"),
    [
        (400, 1e6, True, "kept"),
        (401, 1e6, True, "k2v2"),
        (401, 1e6, False, "kept"),
        (401, 2e6, True, "kept"),
        (801, 2e6, True, "k2v2"),
        (1001, 1e12, True, "k2v2"),
    ],
    ids=str,
)
def test_what_would_be_long_under_way_is_coded(
    prompt: int, link_bytes_per_s: float, may_code: bool, chosen: str
) -> None:
    by_link = ByLink(ByLength(("k2v2", "kept"), 1000), 250.0, link_bytes_per_s, 0.1)
    assert by_link.choose(prompt, 0, may_code=may_code) == chosen


@pytest.mark.parametrize(("floor", "chosen"), list(enumerate([*FORMS, "kept"])))
def test_a_slow_link_gives_nobody_fewer_bits_than_its_tenant_stepped_back_to(
    floor: int, chosen: str
) -> None:
    by_link = ByLink(ByLength(FORMS, 1000), 250.0, 1e6, 0.1)
    assert by_link.choose(900, 9, may_code=True, floor=floor) == chosen
