from __future__ import annotations

import inspect
import re

import pytest

from kvkeep import errors


def test_every_error_is_drawn_in_the_tree() -> None:
    drawn = (errors.__doc__ or "").split()
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, Exception):
            assert name in drawn
            assert issubclass(kind, errors.KvkeepError)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.InvalidRequest, 400),
        (errors.Unauthenticated, 401),
        (errors.Forbidden, 403),
        (errors.PayloadTooLarge, 413),
        (errors.TooManyRequests, 429),
    ],
)
def test_a_refusal_carries_its_status_and_field(
    kind: type[errors.RequestError], status: int
) -> None:
    error = kind("too long", param="prompt")
    assert (str(error), error.param, error.status) == ("too long", "prompt", status)
    assert kind("no").param is None


def test_a_fault_is_told_by_kind_and_line_and_not_in_its_words() -> None:
    with pytest.raises(ValueError, match="a secret") as caught:
        int("a secret")
    told = errors.unexpected(caught.value)
    assert re.fullmatch(r"ValueError at test_errors\.py:\d+", told)
    assert errors.unexpected(ValueError("a secret")) == "ValueError"
