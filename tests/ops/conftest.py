"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest

from kvkeep.types import Layout
from tests.ops.paths import LAYOUTS, PATHS, Path


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    name: Path = request.param
    return name


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.name)
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout(request.param)
