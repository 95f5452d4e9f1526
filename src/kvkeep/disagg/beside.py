"""What stands beside a worker's loop, and the core that it works with; loads torch."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Final

import msgspec

from kvkeep.disagg import wire
from kvkeep.disagg.decode import DecodeSide
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.prefill import NothingBelow, PrefillSide
from kvkeep.engine import messages as m
from kvkeep.engine.build import build_core, default_parts
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import Seal, transfer_seal_of

VERSION: Final = f"kvkeep {version('kvkeep')}, wire {wire.VERSION}"
"""What workers that speak with each other have in common."""


def side_of(
    role: Role,
    engine: EngineOptions,
    link: LinkOptions,
    inbox: m.Inbox,
    seal: Seal = transfer_seal_of,
) -> PrefillSide | DecodeSide:
    """Return what stands beside a worker's loop; raises `ConfigError`."""
    return (PrefillSide if role == "prefill" else DecodeSide)(engine, link, inbox, seal=seal)


def build_beside(
    engine: EngineOptions, side: PrefillSide | DecodeSide, reply: m.Sink
) -> EngineCore:
    """Return a core whose pages a side sends, or whose tier it is."""
    parts = default_parts(engine)
    if isinstance(side, DecodeSide):
        parts = msgspec.structs.replace(parts, tier=side, elsewhere=side)
    else:
        tier = None if engine.tiers else NothingBelow()
        parts = msgspec.structs.replace(parts, tier=tier, listeners=(side,))
    core = build_core(engine, reply, parts)
    core.info = msgspec.structs.replace(core.info, version=VERSION, pid=os.getpid())
    return core
