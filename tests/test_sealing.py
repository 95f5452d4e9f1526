from __future__ import annotations

from dataclasses import replace

import pytest

from kvkeep.sealing import SealContext
from kvkeep.types import PageKind, PageTag

CONTEXT = SealContext("a", PageTag("a"), b"h" * 32, b"m" * 32, b"s" * 16)


@pytest.mark.parametrize(
    "other",
    [
        replace(CONTEXT, owner="b"),
        replace(CONTEXT, tag=PageTag("a", codec="k2v2")),
        replace(CONTEXT, chain_hash=b"i" * 32),
        replace(CONTEXT, model_digest=b"n" * 32),
        replace(CONTEXT, spec_digest=b"t" * 16),
        replace(CONTEXT, kind=PageKind.FIRST),
        replace(CONTEXT, chain_hash=b"h" * 31, model_digest=b"h" + b"m" * 32),
    ],
)
def test_every_field_is_bound(other: SealContext) -> None:
    assert other.associated_data() != CONTEXT.associated_data()
