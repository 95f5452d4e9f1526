"""Labelled passages from a world: templates with slots, values, and what of it is sensitive.

A template is text with slots such as `<name>`. A slot is filled from the language's value lists and
patterns (which may hold slots again), from the world's common ones, or by a maker of `values.py`.
A slot that `KINDS` names becomes a span; everything else is ordinary text.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tools.detector_data.values import MAKERS

LANGUAGES: Final = ("en", "de", "fr", "es", "it", "ja", "zh", "uk")
LOCALES: Final[Mapping[str, str]] = {
    lang: "zh_CN" if lang == "zh" else lang for lang in LANGUAGES if lang != "en"
}
"""Folder of a language's translations on a machine, of messages and of manual pages alike."""
LIMIT: Final = 512
"""Characters of a passage."""
SLOT: Final = re.compile(r"<([a-z_0-9]+)>")
SPACELESS: Final = ("ja", "zh")


class Kind(NamedTuple):
    """What a span says and the category it counts to."""

    kind: str
    category: str
    free_text: bool = False


KINDS: Final[Mapping[str, Kind]] = {
    "name": Kind("person_name", "person", free_text=True),
    "address": Kind("address", "location", free_text=True),
    "birthday": Kind("date_of_birth", "date", free_text=True),
    "diagnosis": Kind("diagnosis", "health", free_text=True),
    "medication": Kind("medication", "health", free_text=True),
    "employer": Kind("employer", "employer", free_text=True),
    "national_id": Kind("national_id", "identifier"),
    "passport": Kind("passport", "identifier"),
    "email": Kind("email", "contact"),
    "phone": Kind("phone", "contact"),
    "iban": Kind("iban", "finance"),
    "card": Kind("card", "finance"),
    "account": Kind("bank_account", "finance"),
    "api_key": Kind("api_key", "credential"),
    "jwt": Kind("jwt", "credential"),
    "password": Kind("password", "credential"),
}
FREE_TEXT: Final = tuple(slot for slot, kind in KINDS.items() if kind.free_text)


class Label(NamedTuple):
    """A sensitive part of a passage, in characters."""

    start: int
    end: int
    kind: str
    category: str


@dataclass(frozen=True, slots=True)
class Passage:
    """A text of at most `LIMIT` characters and its sensitive parts."""

    text: str
    lang: str
    labels: tuple[Label, ...] = ()
    target: str = ""
    """The kind it was made for; empty: nothing sensitive."""


@dataclass(frozen=True, slots=True)
class Language:
    """One language of a world."""

    lang: str
    values: Mapping[str, Sequence[str]]
    positive: Sequence[str]
    negative: Sequence[str]


def read_language(folder: Path, lang: str) -> Language:
    """Read a language's lists, the world's common ones behind them."""
    own, common = (
        tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
        for name in (lang, "common")
    )
    values = {
        slot: tuple(part.strip() for part in text.split("|"))
        for slot, text in (common["values"] | own["values"]).items()
    }
    templates = {
        side: tuple(text.replace("\\n", "\n") for text in (*own[side], *common[side]))
        for side in ("positive", "negative")
    }
    return Language(lang, values, templates["positive"], templates["negative"])


class World:
    """The templates and values of one world, drawn from by a seed."""

    def __init__(self, languages: Mapping[str, Language], seed: int) -> None:
        self.languages = languages
        self._seed = seed

    @classmethod
    def read(cls, folder: Path, seed: int) -> World:
        """Return the world of a folder."""
        return cls({lang: read_language(folder, lang) for lang in LANGUAGES}, seed)

    def _fill(self, template: str, language: Language, rng: random.Random) -> Passage:
        """Return a template with its slots filled."""
        text = ""
        labels: list[Label] = []
        at = 0
        for slot in SLOT.finditer(template):
            text += template[at : slot.start()]
            at = slot.end()
            name = slot[1]
            if name in language.values:
                part = self._fill(rng.choice(language.values[name]), language, rng)
            elif name in MAKERS:
                part = Passage(MAKERS[name](rng, language.lang), language.lang)
            else:
                raise ValueError(f"{language.lang}: the slot <{name}> has no values")
            if name in KINDS:
                kind = KINDS[name]
                labels.append(
                    Label(len(text), len(text) + len(part.text), kind.kind, kind.category)
                )
            text += part.text
        return Passage(text + template[at:], language.lang, tuple(labels))

    def _join(self, parts: Sequence[Passage], joint: str) -> Passage:
        """Return passages one after the other."""
        text = ""
        labels: list[Label] = []
        for part in parts:
            text += joint if text else ""
            labels += [
                label._replace(start=label.start + len(text), end=label.end + len(text))
                for label in part.labels
            ]
            text += part.text
        return Passage(text, parts[0].lang, tuple(labels))

    def _around(self, core: str, language: Language, rng: random.Random, target: str) -> Passage:
        """Return a template with up to two ordinary ones around it, within the limit."""
        joint = "\n" if rng.random() < 0.3 else ("" if language.lang in SPACELESS else " ")
        for _ in range(50):
            parts = [self._fill(core, language, rng)]
            for _ in range(rng.choice((0, 0, 1, 2))):
                other = self._fill(rng.choice(language.negative), language, rng)
                parts.insert(rng.randint(0, len(parts)), other)
            made = self._join(parts, joint)
            if len(made.text) <= LIMIT:
                return Passage(made.text, language.lang, made.labels, target)
        raise ValueError(f"{language.lang}: a template is longer than {LIMIT} characters: {core!r}")

    def positives(self, lang: str, slot: str, count: int) -> Iterator[Passage]:
        """Yield passages that hold this slot's kind; none where the language lacks it."""
        language = self.languages[lang]
        rng = random.Random(f"{self._seed}/{lang}/{slot}")
        fitting = [template for template in language.positive if f"<{slot}>" in template]
        for _ in range(count if fitting else 0):
            yield self._around(rng.choice(fitting), language, rng, KINDS[slot].kind)

    def negatives(self, lang: str, count: int) -> Iterator[Passage]:
        """Yield passages without anything sensitive that look as if there were."""
        language = self.languages[lang]
        rng = random.Random(f"{self._seed}/{lang}/negative")
        for _ in range(count):
            yield self._around(rng.choice(language.negative), language, rng, "")

    def templates(self) -> set[str]:
        """Return every template of every language."""
        each = self.languages.values()
        return {text for one in each for text in (*one.positive, *one.negative)}

    def listed_values(self) -> set[str]:
        """Return every listed value, in lower case, patterns left out."""
        each = self.languages.values()
        listed = (text for one in each for texts in one.values.values() for text in texts)
        return {text.casefold() for text in listed if "<" not in text}
