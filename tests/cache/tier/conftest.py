from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cache.tier.rigs import KINDS, Rig


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(KINDS[request.param])
    yield made
    made.tier.close(5.0)


@pytest.fixture
def disk() -> Iterator[Rig]:
    made = Rig(KINDS["disk"])
    yield made
    made.tier.close(5.0)
