"""Values from Faker and invented ones, each on one side: the training world's or validation's."""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Final

from faker import Faker
from faker.providers.address.it_IT import Provider as ItalianPlaces

from tools.detector_data.passages import Language, read_language

SEED: Final = 90_210
DRAWS: Final = 1500
INVENTED: Final = 500
"""Values of a slot made by a chain of characters."""
ORDER: Final = 3
RESERVED: Final = 5
"""One value of so many is validation's."""
LISTED: Final = frozenset(
    {
        *("given", "family", "city", "street", "employer", "medication", "diagnosis", "pub"),
        *("xgiven", "xfamily", "given_case", "family_case", "prod", "co", "pwword", "handle"),
    }
)
"""Slots of values, as against wording: each of theirs is either training's or validation's."""
FOLDERS: Final = tuple(Path(__file__).parent / name for name in ("training", "validation"))
LOCALES: Final = {
    "en": ("en_US", "en_GB", "en_IN"),
    "de": ("de_DE", "de_AT"),
    "fr": ("fr_FR",),
    "es": ("es_ES", "es_MX"),
    "it": ("it_IT",),
    "ja": ("ja_JP",),
    "zh": ("zh_CN",),
    "uk": ("uk_UA",),
}
LATIN: Final = ("en", "de", "fr", "es", "it")
FOREIGN: Final = ("pl_PL", "tr_TR", "nl_NL", "pt_BR", "cs_CZ", "sv_SE", "vi_VN", "ro_RO", "hr_HR")
"""Locales whose names any language in Latin script may meet."""
CASES: Final = {
    "ко": ("ка", "ку", "ком"),
    "ук": ("ука", "уку", "уком"),
    "юк": ("юка", "юку", "юком"),
    "ський": ("ського", "ському", "ським"),
    "ська": ("ської", "ській", "ською"),
    "ія": ("ії", "ією"),
    "а": ("и", "і", "у", "ою"),
    "я": ("і", "ю", "ею"),
    "о": ("а", "ові", "ом"),
    "р": ("ра", "ру", "ром"),
    "н": ("на", "ну", "ном"),
    "й": ("я", "ю", "єм"),
}
"""Ukrainian endings and what they become in other cases."""


def public() -> Mapping[str, Sequence[str]]:
    """Return people whom everybody knows, by language."""
    text = (Path(__file__).parent / "public.toml").read_text(encoding="utf-8")
    return {lang: names.split("|") for lang, names in tomllib.loads(text).items()}


def reserved(value: str) -> bool:
    """Tell whether a value is validation's."""
    return hashlib.sha256(value.casefold().encode()).digest()[0] % RESERVED == 0


@cache
def drawn(lang: str) -> Mapping[str, Sequence[str]]:
    """Return Faker's values of a language by slot, sorted."""
    found: dict[str, set[str]] = defaultdict(set)
    for locale in LOCALES[lang]:
        fake = Faker(locale)
        fake.seed_instance(SEED)
        makers: dict[str, Callable[[], str]] = {
            "given": fake.first_name,
            "family": fake.last_name,
            "block" if lang == "ja" else "city": fake.town if lang == "ja" else fake.city,
            "employer": fake.company,
        }
        if lang == "it":  # Faker's list was a set, whose order is another one in each process
            makers["city"] = partial(fake.random_element, sorted(ItalianPlaces.cities))
        if lang not in {"ja", "zh", "uk"}:
            makers["street"] = fake.street_name
        for slot, make in makers.items():
            found[slot] |= {make() for _ in range(DRAWS if slot != "employer" else DRAWS // 8)}
    if lang == "zh":
        del found["city"]
    return {slot: sorted(values - {""}) for slot, values in found.items()}


@cache
def foreign() -> Mapping[str, Sequence[str]]:
    """Return names of people from elsewhere, in Latin script."""
    found: dict[str, set[str]] = {"xgiven": set(), "xfamily": set()}
    for locale in FOREIGN:
        fake = Faker(locale)
        fake.seed_instance(SEED)
        found["xgiven"] |= {fake.first_name() for _ in range(300)}
        found["xfamily"] |= {fake.last_name() for _ in range(300)}
    return {slot: sorted(values - {""}) for slot, values in found.items()}


def invented(values: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return new words that look like some words: a chain over `ORDER` characters."""
    chain: dict[str, list[str]] = defaultdict(list)
    plain = [value for value in values if "<" not in value and " " not in value]
    for value in plain:
        text = "^" * ORDER + value + "$"
        for at in range(ORDER, len(text)):
            chain[text[at - ORDER : at]].append(text[at])
    found: set[str] = set()
    for _ in range(3 * count if len(plain) > 50 else 0):
        text = "^" * ORDER
        while not text.endswith("$") and len(text) < 16:
            text += rng.choice(chain[text[-ORDER:]])
        made = text.strip("^$")
        if 3 <= len(made) < 13 and len(found) < count:
            found.add(made)
    return sorted(found)


def inflected(values: Iterable[str]) -> list[str]:
    """Return Ukrainian names in other cases."""
    found = set()
    for value in values:
        for ending in sorted(CASES, key=len, reverse=True):
            if value.endswith(ending):
                found |= {value[: -len(ending)] + other for other in CASES[ending]}
                break
    return sorted(found)


def extended(lang: str, folder: Path, keep: Callable[[str, str], bool]) -> Language:
    """Return a folder's language with the lists of both, Faker's and invented values.

    Of each list there is what `keep(slot, value)` admits; patterns stay with their folder.
    """
    own = read_language(folder, lang)
    added = {slot: list(values) for slot, values in drawn(lang).items()}
    for other in FOLDERS:
        for slot, values in read_language(other, lang).values.items():
            if slot in LISTED and other != folder:
                added.setdefault(slot, []).extend(value for value in values if "<" not in value)
    rng = random.Random(f"{SEED}/{lang}")
    for slot in ("given", "family", "city"):
        added.setdefault(slot, []).extend(invented(drawn(lang).get(slot, ()), INVENTED, rng))
    added.setdefault("pub", []).extend(public()[lang])
    if lang in LATIN:
        added |= {slot: list(values) for slot, values in foreign().items()}
    if lang == "uk":
        added |= {f"{slot}_case": inflected(added[slot]) for slot in ("given", "family")}
    found = {}
    for slot in {**own.values, **added}:
        once = dict.fromkeys((*own.values.get(slot, ()), *added.get(slot, ())))
        if kept := tuple(value for value in once if keep(slot, value)):
            found[slot] = kept
    return replace(own, values=found)
