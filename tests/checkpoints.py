"""A fixture: tiny random checkpoints of every family, made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.models import make, shapes


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a directory per family."""
    root = tmp_path_factory.mktemp("tiny")
    paths = {}
    for family in shapes.TINY:
        paths[family] = root / family
        make.tiny(family, paths[family], seed=0)
    return paths
