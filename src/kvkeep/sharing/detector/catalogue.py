"""Rules as data: TOML files of patterns with their context, check, entropy and source."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.checks import CHECKS
from kvkeep.sharing.detector.patterns import Pattern
from kvkeep.sharing.detector.spans import CATEGORIES

_PLACEHOLDER = re.compile(r"<<(\w+)>>")
LONGEST_MATCH: Final = 192
"""Characters a match may need; more could hide at the edge between two pieces of a text."""
_REPEAT = re.compile(r"(?<!\\x)\{(\d+)")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one kind of sensitive text is recognised."""

    id: str
    kind: str
    category: str
    pattern: str
    """RE2 syntax; the first group that takes part is the value, else the whole match."""
    source: str
    """Where the format is published."""
    score: float = 1.0
    """When every condition holds."""
    check: tuple[str, ...] = ()
    """Names in `CHECKS`; one that accepts the value is enough."""
    entropy: float = 0.0
    """Least Shannon entropy of the value in bits per character."""
    context: tuple[str, ...] = ()
    """Words of which one must stand near the value; a word may end in `*`."""
    reach: int = 48
    """Characters before and after the value in which context counts."""
    alone: float = 0.0
    """Score where no context word is near."""
    deny: tuple[str, ...] = ()
    """Words that make the value harmless when one stands within 16 characters before it."""
    edge: str = "word"
    """What may not touch the value: `word` letters and digits, `digit` digits, `number` digits,
    one space, dash or dot between them or not, `none`."""


class RuleFile:
    """A parsed TOML file that can name the line of a complaint."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._lines = text.splitlines()
        try:
            self.values: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{name}: {error}") from None
        except RecursionError:
            raise ConfigError(f"{name}: lists or tables are nested too deep") from None

    def refuse(self, reason: str, key: str = "", table: str = "", index: int = 0) -> ConfigError:
        """Return the error for a key of the index-th `[[table]]` (of the file: table is empty)."""
        return ConfigError(f"{self.name}:{self.line(key, table, index)}: {reason}")

    def line(self, key: str, table: str = "", index: int = 0) -> int:
        """Return the line of a key, or of its table's head where the key is missing."""
        start = 0
        if table:
            heads = [
                n
                for n, line in enumerate(self._lines)
                if line.split("#")[0].strip("[] \t") == table
            ]
            start = heads[index] if index < len(heads) else 0
        for number in range(start, len(self._lines)):
            text = self._lines[number].lstrip()
            if number > start and text.startswith("["):
                break
            if key and re.match(rf"\"?{re.escape(key)}\"?\s*=", text):
                return number + 1
        return start + 1


def check_keys(
    document: RuleFile, given: Iterable[str], known: Sequence[str], table: str = "", index: int = 0
) -> None:
    """Refuse a key that nothing reads, naming the nearest one that something does."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise document.refuse(f"no key {key!r}; {remedy}", key, table, index)


_FIELDS: Final = {field.name: field for field in dataclasses.fields(Rule)}
_REQUIRED: Final = ("id", "kind", "category", "pattern", "source")


def parse_rules(document: RuleFile, defaults: Mapping[str, Any] | None = None) -> list[Rule]:
    """Return the `[[rule]]` tables of a file; errors name file, line and reason."""
    lists = document.values.get("lists", {})
    rules: list[Rule] = []
    for index, given in enumerate(document.values.get("rule", [])):
        check_keys(document, given, tuple(_FIELDS), "rule", index)
        values = {**(defaults or {}), **given}
        for key in _REQUIRED:
            if not values.get(key):
                raise document.refuse(f"a rule needs {key!r}", "", "rule", index)
        for key, value in values.items():
            try:
                values[key] = _convert(key, value, lists)
            except ConfigError as error:
                raise document.refuse(f"{key}: {error}", key, "rule", index) from None
        if any(rule.id == values["id"] for rule in rules):
            raise document.refuse(f"id: {values['id']!r} is taken", "id", "rule", index)
        rules.append(Rule(**values))
    return rules


def _convert(key: str, value: Any, lists: Mapping[str, Sequence[str]]) -> Any:
    """Return a rule's value in its type, or raise with the reason."""
    kind = str(_FIELDS[key].type)
    if kind.startswith("tuple"):
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(w, str) and w for w in words):
            raise ConfigError("must be a list of words")
        value = tuple(words)
    elif kind == "str" and not isinstance(value, str):
        raise ConfigError("must be text")
    elif kind in {"float", "int"} and (
        isinstance(value, bool) or not isinstance(value, int | float)
    ):
        raise ConfigError("must be a number")
    return _CONVERSIONS.get(key, lambda value, _: value)(value, lists)


def _pattern(value: str, lists: Mapping[str, Sequence[str]]) -> str:
    def words(match: re.Match[str]) -> str:
        if match[1] not in lists:
            raise ConfigError(f"no list {match[1]!r} under [lists]")
        return f"(?:{'|'.join(re.escape(word) for word in lists[match[1]])})"

    text = _PLACEHOLDER.sub(words, value)
    if Pattern(text).search(b"") is not None:
        raise ConfigError("matches empty text; make a part of it obligatory")
    if any(int(number) > LONGEST_MATCH for number in _REPEAT.findall(text)):
        raise ConfigError(f"needs more than {LONGEST_MATCH} characters; match the beginning alone")
    return text


def _one_of(known: Iterable[str], value: str) -> str:
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        choice = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(sorted(known))}"
        raise ConfigError(f"there is no {value!r}; {choice}")
    return value


def _unit(value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError("must lie between 0 and 1")
    return float(value)


_CONVERSIONS: Final[Mapping[str, Any]] = {
    "pattern": _pattern,
    "category": lambda value, _: _one_of(CATEGORIES, value),
    "check": lambda value, _: tuple(_one_of(CHECKS, name) for name in value),
    "edge": lambda value, _: _one_of(("word", "digit", "number", "none"), value),
    "score": lambda value, _: _unit(value),
    "alone": lambda value, _: _unit(value),
}


def shipped_rules() -> list[Rule]:
    """Return the rules of every catalogue file in the package."""
    folder = resources.files("kvkeep.sharing.detector") / "catalogue"
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".toml")),
        key=lambda entry: entry.name,
    )
    rules: list[Rule] = []
    for entry in files:
        rules += load_rules(entry.name, entry.read_text(encoding="utf-8"))
    return rules


def load_rules(name: str, text: str) -> list[Rule]:
    """Return the rules of one catalogue file."""
    document = RuleFile(name, text)
    check_keys(document, document.values, ("licence", "lists", "rule"))
    if not isinstance(document.values.get("licence"), str):
        raise document.refuse("licence: a catalogue names the licence of its rules")
    return parse_rules(document)


def read_rules(path: Path) -> list[Rule]:
    """Return the rules of a file outside the package."""
    try:
        return load_rules(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
