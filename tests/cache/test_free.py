from __future__ import annotations

import numpy as np
import pytest

from kvkeep.cache.free import FreeList
from kvkeep.errors import EngineError


def test_an_id_given_back_twice_is_an_error() -> None:
    free = FreeList(4, "tile")
    ids = free.take(2)
    with pytest.raises(EngineError):
        free.give_back(np.array([ids[0], ids[0]], np.int32))
    free.give_back(ids[:0])
    assert len(free) == 2
