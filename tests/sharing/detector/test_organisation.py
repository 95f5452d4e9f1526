from __future__ import annotations

import dataclasses
import os
from functools import cache
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.catalogue import Rule
from kvkeep.sharing.detector.default import load_detector
from kvkeep.sharing.detector.organisation import OrganisationFile, parse_organisation
from kvkeep.sharing.detector.scanner import Detector
from kvkeep.sharing.detector.spans import Span, Verdict

FILE = """
[categories]
location = false

[[words]]
words = ["Project Falcon", "極秘計画", "Müller*"]
kind = "project"

[[allow]]
words = ["info@firma.de"]
patterns = ['support-[0-9]+@firma\\.de']

[[allow]]
words = ["AKIAQYLPMN5HFIQR7XYA"]
kinds = ["api_key"]

[[rule]]
id = "ticket"
pattern = 'TCK-[0-9]{6}'
"""


@cache
def detector(text: str) -> Detector:
    return load_detector(parse_organisation("org.toml", text), rules_only=True)


def kinds(text: str, rules: str = FILE) -> set[str]:
    return {span.kind for span in detector(rules).scan(text).spans}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("about project falcon now", {"project"}),
        ("ＰＲＯＪＥＣＴ　Ｆａｌｃｏｎ", {"project"}),
        ("これは極秘計画です", {"project"}),
        ("bei Müllers", {"project"}),
        ("ticket TCK-482913", {"organisation"}),
        ("write to info@firma.de", set()),
        ("write to INFO@firma.de", set()),
        ("write to support-12@firma.de", set()),
        ("write to xsupport-12@firma.de", {"email"}),
        ("key AKIAQYLPMN5HFIQR7XYA", set()),
        ("lives at 221 Baker Street", set()),
        ("the falcon flies", set()),
    ],
)
def test_words_patterns_allow_lists_and_categories(text: str, expected: set[str]) -> None:
    assert kinds(text) == expected


def test_a_credential_is_allowed_only_where_its_kind_is_named() -> None:
    rules = '[[allow]]\nwords = ["AKIAQYLPMN5HFIQR7XYA"]\n'
    assert kinds("AKIAQYLPMN5HFIQR7XYA", rules) == {"api_key"}


def test_a_part_of_what_is_allowed_is_allowed_but_a_credential_in_it_is_not() -> None:
    rules = parse_organisation("o.toml", '[[allow]]\nwords = ["a@b.de"]\n')
    whole = Span(0, 6, "email", "contact", 1.0, "rule")
    part = Span(2, 3, "employer", "employer", 0.5, "scorer")
    key = Span(2, 3, "api_key", "credential", 1.0, "rule")
    wider = Span(0, 8, "person_name", "person", 0.9, "scorer")
    assert rules.judge("a@b.de, c", [whole, part, key, wider]) == [key, wider]


def test_own_spans_say_where_they_come_from_and_taint() -> None:
    found = detector(FILE).scan("x TCK-482913 Project Falcon")
    assert {span.source for span in found.spans} == {"organisation"}
    assert found.verdict is Verdict.TAINT


RULE = """[[rule]]
id = "a"
kind = "ticket"
category = "identifier"
pattern = "a"
"""


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("word = 1\n", 1, "no key 'word'; did you mean 'words'"),
        ("words = 1\n", 1, r"write it as \[\[words\]\]"),
        ("[[words]]\nwords = []\n", 2, "name at least one word"),
        ('[[words]]\nwords = ["*"]\n', 2, "must be a list of words"),
        ('[[words]]\nwords = ["a"]\nscores = 1\n', 3, "did you mean 'score'"),
        ('[[words]]\nwords = ["a"]\nscore = 3\n', 3, "between 0 and 1"),
        ('[[words]]\nwords = ["a"]\ncategory = "x"\n', 3, "category: one of"),
        ("categories = 1\n", 1, "must be a table"),
        ("[categories]\nlocatoin = false\n", 2, "did you mean 'location'"),
        ("[categories]\nlocation = 1\n", 2, "must be true or false"),
        ("\n[[allow]]\npatterns = ['(a)\\1']\n", 3, "patterns: .*back-references"),
        ('[[allow]]\nword = ["a"]\n', 2, "did you mean 'words'"),
        ('[[words]]\nwords = ["a"]\ncategory = ["person"]\n', 3, "category: one of"),
        ("[[rule]]\nid = 'a'\n", 1, "a rule needs 'pattern'"),
        (RULE + "deny = true\n", 6, "deny: must be a list of words"),
        (RULE + "context = 3\n", 6, "context: must be a list of words"),
    ],
)
def test_a_broken_file_names_line_and_reason(text: str, line: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^org\.toml:{line}: .*{reason}"):
        parse_organisation("org.toml", text)


VALUES = ["true", "3", "-1.5", '""', '"x"', "[]", "[1]", '["a"]', "[[]]", "{ a = 1 }", "1979-05-27"]


@pytest.mark.parametrize("table", ["rule", "words", "allow"])
def test_a_value_of_any_type_under_any_key_is_taken_or_refused(table: str) -> None:
    """What ends a reload in another error would end the engine."""
    keys = {field.name for field in dataclasses.fields(Rule)} | {"words", "patterns", "kinds"}
    refused = []
    for key in sorted(keys):
        for value in VALUES:
            others = (line for line in RULE.splitlines()[1:] if not line.startswith(f"{key} ="))
            own = "\n".join(others) if table == "rule" else ""
            try:
                parse_organisation("org.toml", f"[[{table}]]\n{own}\n{key} = {value}\n")
            except ConfigError as error:
                refused.append(str(error))
    assert len(refused) > len(keys)
    assert all(sentence.startswith("org.toml") for sentence in refused)


def touch(path: Path, text: str, at: int) -> None:
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(at, at))


def test_a_changed_file_is_taken_and_a_broken_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "org.toml"
    touch(path, '[[words]]\nwords = ["falcon"]\n', 1)
    rules = OrganisationFile(path)
    watched = load_detector(rules, rules_only=True)
    first = watched.version
    assert not rules.reload()
    assert watched.scan("the falcon").verdict is Verdict.TAINT

    touch(path, '[[words]]\nwords = ["eagle"]\n', 2)
    assert rules.reload()
    assert watched.scan("the falcon").verdict is Verdict.CLEAR
    assert watched.scan("the eagle").verdict is Verdict.TAINT
    assert watched.version != first

    touch(path, "[[words]]\nword = 1\n", 3)
    assert not rules.reload()
    assert "did you mean 'words'" in str(rules.problem)
    assert watched.scan("the eagle").verdict is Verdict.TAINT

    touch(path, "x = " + "[" * 9999 + "]" * 9999, 4)
    assert not rules.reload()
    assert "nested too deep" in str(rules.problem)
    assert watched.scan("the eagle").verdict is Verdict.TAINT

    path.unlink()
    assert not rules.reload()
    assert "cannot be read" in str(rules.problem)
    touch(path, '[[words]]\nwords = ["owl"]\n', 4)
    assert rules.reload()
    assert rules.problem is None
    path.write_bytes(b"\xff")
    assert not rules.reload()


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        OrganisationFile(tmp_path / "none.toml")
