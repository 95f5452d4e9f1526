"""Window and weight per layer and KV head, in a file beside the checkpoint they belong to."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from kvkeep.measured import Measured


class HeadRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a KV head calls important, and for how long."""

    window: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    """w, in tokens."""
    weight: Annotated[float, msgspec.Meta(gt=0, le=1024)]
    """c, in shares of the mean weight."""


class Calibration(Measured[HeadRule], frozen=True):
    """The rule of each KV head of each layer."""

    FILE: ClassVar[str] = "kvkeep_evict.json"
    SETTING: ClassVar[str] = "evict"
    REMEDY: ClassVar[str] = "run `kvkeep model calibrate --evict` again, or remove it"
