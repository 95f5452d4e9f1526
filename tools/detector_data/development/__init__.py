"""The development world: what a detector is chosen by; nothing is trained and no bound set on it.

Its wording is its own, its values are validation's and some that no other world lists.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from tools.detector_data import validation
from tools.detector_data.lists import SEED
from tools.detector_data.passages import LANGUAGES, Language, World, read_language

FOLDER: Final = Path(__file__).parent
PROMPTS: Final = FOLDER / "prompts.toml"
"""Parts of public prompts."""


def own() -> World:
    """Return the folder's templates and the values that it lists."""
    return World({lang: read_language(FOLDER, lang) for lang in LANGUAGES}, SEED + 2)


def world() -> World:
    """Return the development world."""
    ours, theirs = own().languages, validation.world().languages
    return World({lang: _joined(ours[lang], theirs[lang]) for lang in LANGUAGES}, SEED + 2)


def _joined(ours: Language, theirs: Language) -> Language:
    values = {
        slot: tuple(dict.fromkeys((*theirs.values.get(slot, ()), *ours.values.get(slot, ()))))
        for slot in (*theirs.values, *ours.values)
    }
    return replace(ours, values=values)
