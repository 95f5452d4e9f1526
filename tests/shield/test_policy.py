from __future__ import annotations

import torch

from kvkeep import ops
from kvkeep.ops.layout import Heads
from kvkeep.shield.policy import NoShield


def test_the_null_object_changes_nothing() -> None:
    heads = Heads(4, 2, 64)
    shield = NoShield()
    x = torch.randn(4, 2, 64)
    assert shield.folds(heads) == ()
    work = shield.on(heads, ops.select("reference", 1))
    assert torch.equal(work.restore(work.transform(x, "q", 0), 0), x)
