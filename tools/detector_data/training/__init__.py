"""The training world: frames crossed with cues and values, Faker's and invented values.

What the held-out world lists is left out here, and of values what is reserved for validation, so
that nothing they ask was learned by heart.
"""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Final

from tools.detector_data import development, heldout, validation
from tools.detector_data.lists import LISTED, SEED, extended, reserved
from tools.detector_data.passages import LANGUAGES, World

CLOSED: Final = frozenset({"month", "ini"})
"""Slots whose values are a language's own: all worlds list them."""


def world() -> World:
    """Return the training world."""
    judging, choosing = heldout.world(), development.own()
    asked = judging.listed_values() | choosing.listed_values()
    templates = judging.templates() | validation.world().templates() | choosing.templates()
    prompts = tomllib.loads((Path(__file__).parent / "prompts.toml").read_text(encoding="utf-8"))

    def keep(slot: str, value: str) -> bool:
        if slot in CLOSED or "<" in value:
            return True
        return value.casefold() not in asked and not (slot in LISTED and reserved(value))

    languages = {}
    for lang in LANGUAGES:
        language = extended(lang, Path(__file__).parent, keep)
        parts = (text.replace("\\n", "\n") for text in (*prompts["common"], *prompts[lang]))
        plain = (*language.negative, *parts)
        languages[lang] = replace(
            language,
            positive=tuple(text for text in language.positive if text not in templates),
            negative=tuple(text for text in plain if text not in templates),
        )
    return World(languages, SEED)
