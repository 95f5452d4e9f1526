"""The validation world: templates and values that training never sees; bounds are set on it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tools.detector_data import heldout
from tools.detector_data.lists import LISTED, SEED, extended, reserved
from tools.detector_data.passages import LANGUAGES, World

FOLDER: Final = Path(__file__).parent
PROMPTS: Final = FOLDER / "prompts.toml"
"""Parts of public prompts, on which bounds are set too."""
CLOSED: Final = frozenset({"month", "initial"})
"""Slots whose values are a language's own: all worlds list them."""


def world() -> World:
    """Return the validation world: of values, the reserved ones alone."""
    asked = heldout.world().listed_values()

    def keep(slot: str, value: str) -> bool:
        if slot in CLOSED or "<" in value:
            return True
        return value.casefold() not in asked and (slot not in LISTED or reserved(value))

    return World({lang: extended(lang, FOLDER, keep) for lang in LANGUAGES}, SEED + 1)
