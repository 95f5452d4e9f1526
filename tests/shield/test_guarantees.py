from __future__ import annotations

from typing import get_args

from kvkeep.config import Settings
from kvkeep.engine.options import ShieldName
from kvkeep.shield.guarantees import GUARANTEES, describe


def test_every_mode_has_a_guarantee_and_says_what_it_does_not_cover() -> None:
    assert set(GUARANTEES) == set(get_args(ShieldName))
    modes, _ = get_args(Settings.model_fields["shield"].annotation)
    assert set(GUARANTEES) == set(get_args(modes))
    for mode in GUARANTEES:
        line = describe(mode)
        assert line.startswith(mode)
        assert "\n" not in line
        assert "not covered:" in line


def test_transforms_are_called_what_they_are() -> None:
    for mode in ("perm", "orth", "mask"):
        assert not GUARANTEES[mode].safe
        assert "(obfuscation)" in describe(mode)
        assert "no protection against someone who has the public weights" in describe(mode)
