from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.catalogue import load_rules, read_rules, shipped_rules

HEAD = 'licence = "Apache-2.0"\n'
RULE = """
[[rule]]
id = "one"
kind = "thing"
category = "identifier"
pattern = 'a[0-9]{3}'
source = "derived"
"""


def test_shipped_rules_are_sound_and_name_their_source() -> None:
    rules = shipped_rules()
    assert len(rules) > 200
    assert len({rule.id for rule in rules}) == len(rules)
    assert all(rule.source for rule in rules)
    grey = {rule.category for rule in rules if rule.score <= 0.7}
    assert grey == {"person", "employer", "health", "location"}, "what has a form taints by itself"
    assert all(rule.score > 0.5 for rule in rules)


def test_a_file_outside_the_package_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(HEAD + RULE)
    (rule,) = read_rules(path)
    assert (rule.id, rule.edge, rule.score) == ("one", "word", 1.0)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rules(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (RULE, 1, "names the licence"),
        (HEAD + "rules = 1\n", 2, "no key 'rules'; did you mean 'rule'"),
        (HEAD + "zzz = 1\n", 2, "no key 'zzz'; known keys: licence, lists, rule"),
        (HEAD + RULE + "entropi = 2\n", 9, "no key 'entropi'; did you mean 'entropy'"),
        (HEAD + RULE.replace('source = "derived"\n', ""), 3, "a rule needs 'source'"),
        (HEAD + RULE.replace("a[0-9]{3}", "(?=a)b"), 7, "pattern: .*look-around"),
        (HEAD + RULE.replace("a[0-9]{3}", r"(a)\1"), 7, "back-references"),
        (HEAD + RULE.replace("a[0-9]{3}", "a*"), 7, "matches empty text"),
        (HEAD + RULE.replace("a[0-9]{3}", "a{193}"), 7, "more than 192 characters"),
        (HEAD + RULE.replace("a[0-9]{3}", "<<city>>"), 7, "no list 'city'"),
        (HEAD + RULE.replace('"identifier"', '"finanse"'), 6, "did you mean 'finance'"),
        (HEAD + RULE.replace('"identifier"', '"zz"'), 6, "one of contact"),
        (HEAD + RULE + 'check = "lun"\n', 9, "did you mean 'luhn'"),
        (HEAD + RULE + 'edge = "sharp"\n', 9, "one of digit, none, number, word"),
        (HEAD + RULE + "score = 2\n", 9, "must lie between 0 and 1"),
        (HEAD + RULE + "alone = -1\n", 9, "must lie between 0 and 1"),
        (HEAD + RULE + 'score = "high"\n', 9, "must be a number"),
        (HEAD + RULE + "entropy = true\n", 9, "must be a number"),
        (HEAD + RULE + "context = [1]\n", 9, "must be a list of words"),
        (HEAD + RULE.replace('"thing"', "3"), 5, "must be text"),
        (HEAD + RULE + RULE, 11, "'one' is taken"),
    ],
)
def test_a_broken_file_names_line_and_reason(text: str, line: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^own\.toml:{line}: .*{reason}"):
        load_rules("own.toml", text)


def test_a_file_that_is_no_toml_names_line_and_column() -> None:
    with pytest.raises(ConfigError, match=r"own\.toml: .*line 2, column"):
        load_rules("own.toml", HEAD + "a = = 2")


def test_lists_are_quoted_into_patterns() -> None:
    lists = '[lists]\nword = ["a.b", "c"]\n'
    (rule,) = load_rules("own.toml", HEAD + lists + RULE.replace("a[0-9]{3}", "x<<word>>"))
    assert rule.pattern == r"x(?:a\.b|c)"
    assert re.search(rule.pattern, "xa.b")
