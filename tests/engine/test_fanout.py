"""Fields for several sequences: what contradicts is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from kvkeep.engine.api import SamplingParams
from kvkeep.engine.fanout import check_fanout
from kvkeep.errors import InvalidRequest


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "max_tokens": 0}, "max_tokens"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"use_beam_search": True, "length_penalty": float("nan")}, "length_penalty"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
        ({"use_beam_search": True, "stop": ("x",)}, "stop"),
        ({"use_beam_search": True, "logit_bias": ((1, 1.0),)}, "logit_bias"),
    ],
)
def test_a_contradiction_is_refused_by_name(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        check_fanout(SamplingParams(**fields))
    assert caught.value.param == name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "best_of": 2},
        {"best_of": 5, "temperature": 0.7},
        {"use_beam_search": True, "temperature": 0.0, "length_penalty": -1.0, "seed": 3},
    ],
)
def test_what_agrees_passes(fields: dict[str, Any]) -> None:
    check_fanout(SamplingParams(**fields))
