"""Which evictor an engine runs with."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from kvkeep.eviction.calibration import Calibration
from kvkeep.eviction.corm import PRESETS, Corm
from kvkeep.eviction.policy import Evictor, KeepAll
from kvkeep.models import hub

_SETTINGS: Final = (
    "window",
    "prompt_rows",
    "recent",
    "weight",
    "most",
    "spread",
    "cap",
    "observe_every",
)
"""Of a preset, what options change."""


def evictor_of(options: EngineOptions) -> Evictor:
    """Return the evictor the options ask for: a preset with what they change of it."""
    given = [name for name in _SETTINGS if getattr(options, f"evict_{name}") is not None]
    if options.evict == "off":
        if given:
            raise ConfigError(f"evict_{given[0]} is given and evict is off; set evict to corm")
        return KeepAll()
    preset = PRESETS.get(options.evict)
    if preset is None:
        raise ConfigError(f"evict: {options.evict!r} is no preset; use off, corm or corm-paper")
    chosen = {name: getattr(options, f"evict_{name}") for name in given}
    if options.evict_window is not None and preset.prompt_rows is not None:
        # A preset's rows are no more than the window that somebody chose.
        chosen.setdefault("prompt_rows", min(preset.prompt_rows, max(1, options.evict_window)))
    measured = measured_heads(options)
    return Corm(replace(preset, **chosen), None if measured is None else measured.layers)


def measured_heads(options: EngineOptions) -> Calibration | None:
    """Return windows and weights by head, where the options leave all to what was measured."""
    given = (options.evict_window, options.evict_weight, options.evict_prompt_rows)
    if options.evict != "corm" or given != (None, None, None):
        return None
    path = hub.resolve(options.model, allow_download=options.allow_download)
    return Calibration.find(path)
