"""The admin port's `/ready`."""

from __future__ import annotations

import json

from tests.server.conftest import Start


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


async def test_the_last_bound_of_a_histogram_is_told_apart_from_none(start: Start) -> None:
    async with start() as server, server.admin() as admin:
        answer = await admin.get("/ready")
    ready = json.loads(answer.content, parse_constant=_no_constant)
    assert answer.headers["content-type"] == "application/json"
    for name in ("ttft_s", "tpot_s", "e2e_s", "step_s"):
        assert ready["engine"][name] == {
            "bounds": [0.1, 1.0, "+Inf"],
            "counts": [1, 2, 3],
            "total": 4.5,
        }
    assert ready["engine"]["finished"] == [["stop", 3], ["length", 4]]
    assert ready["model"]["eos_token_ids"] == [257]
