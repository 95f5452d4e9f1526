from __future__ import annotations

import torch

from kvkeep.shield.policy import NoShield
from kvkeep.types import PageTag, SealContext


def test_the_null_object_changes_nothing() -> None:
    shield = NoShield()
    context = SealContext(PageTag("a"), b"h" * 32, layer=0, position=0, model_digest=b"m" * 32)
    x = torch.randn(4, 2, 64)
    assert shield.folds() == ()
    assert torch.equal(shield.restore(shield.transform(x, "q")), x)
    assert shield.open(shield.seal(b"page", context), context) == b"page"
