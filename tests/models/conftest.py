"""Tiny checkpoints, one per family, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.models.make import tiny
from kvkeep.ops import Ops, select


@pytest.fixture(scope="session")
def ops() -> Ops:
    """Return the oracle."""
    return select("reference", 1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a family's checkpoint, which tests must not change."""
    root = tmp_path_factory.mktemp("tiny")

    def get(family: str) -> Path:
        path = root / family
        return path if path.exists() else tiny(family, path)

    return get


@pytest.fixture
def broken(shared: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy of a checkpoint for a test to break."""
    return shutil.copytree(shared("qwen2"), tmp_path / "broken")
