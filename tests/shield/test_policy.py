from __future__ import annotations

import torch

from kvkeep.shield.policy import NoShield


def test_the_null_object_changes_nothing() -> None:
    shield = NoShield()
    x = torch.randn(4, 2, 64)
    assert shield.folds() == ()
    assert torch.equal(shield.restore(shield.transform(x, "q")), x)
