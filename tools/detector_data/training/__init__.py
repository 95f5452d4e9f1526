"""The training world: templates, its own value lists, and names, places and firms from Faker.

Whatever the held-out world lists is left out here, so that nothing it asks was learned by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from faker import Faker

from tools.detector_data import heldout
from tools.detector_data.passages import LANGUAGES, Language, World, read_language

SEED: Final = 90_210
DRAWS: Final = 2500
CLOSED: Final = frozenset({"month", "initial"})
"""Slots whose values are a language's own: both worlds list them."""
LOCALES: Final = {
    "en": ("en_US", "en_GB"),
    "de": ("de_DE", "de_AT"),
    "fr": ("fr_FR",),
    "es": ("es_ES", "es_MX"),
    "it": ("it_IT",),
    "ja": ("ja_JP",),
    "zh": ("zh_CN",),
    "uk": ("uk_UA",),
}


def _drawn(lang: str) -> Mapping[str, Sequence[str]]:
    """Return what Faker adds to a language's lists, sorted."""
    found: dict[str, set[str]] = {slot: set() for slot in ("given", "family", "city", "street")}
    found["employer"] = set()
    for locale in LOCALES[lang]:
        fake = Faker(locale)
        fake.seed_instance(SEED)
        makers: dict[str, Callable[[], str]] = {
            "given": fake.first_name,
            "family": fake.last_name,
            "city": fake.town if lang == "ja" else fake.city,
            "street": fake.street_name if lang not in {"ja", "zh"} else str,
            "employer": fake.company,
        }
        for slot, make in makers.items():
            found[slot] |= {make() for _ in range(DRAWS if slot != "employer" else DRAWS // 10)}
    if lang == "ja":
        found["block"] = found.pop("city")
    if lang == "zh":
        del found["city"]
    if lang == "uk":
        del found["street"]
    return {slot: sorted(values - {""}) for slot, values in found.items()}


def _extended(language: Language, unseen: frozenset[str]) -> Language:
    """Return a language with Faker's values added and the held-out world's taken away."""
    added = _drawn(language.lang)
    values = {
        slot: tuple(
            value
            for value in (*own, *added.get(slot, ()))
            if slot in CLOSED or value.casefold() not in unseen
        )
        for slot, own in language.values.items()
    }
    return replace(language, values=values)


def world() -> World:
    """Return the training world."""
    unseen = frozenset(heldout.world().listed_values())
    folder = Path(__file__).parent
    languages = {lang: _extended(read_language(folder, lang), unseen) for lang in LANGUAGES}
    return World(languages, SEED)
