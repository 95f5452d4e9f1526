from __future__ import annotations

import timeit
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import re2

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.patterns import Hit, Pattern, PatternSet
from tests.sharing.detector.corpus import texts


@pytest.mark.parametrize("text", [r"(a)\1", "(?=a)", "(?<!a)b", "(", "a{2000}"])
def test_what_needs_backtracking_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is refused"):
        Pattern(text)


def test_the_value_is_the_first_group_that_took_part() -> None:
    assert Pattern("x(a)|y(b)").search(b"__yb") == Hit(2, 4, (3, 4))
    assert Pattern("ab").search(b"_ab") == Hit(1, 3, (1, 3))
    assert Pattern("ab").search(b"_ab", 2) is None


def test_hits_do_not_overlap_and_end() -> None:
    assert [hit.start for hit in Pattern("aa|$").hits(b"aaaa")] == [0, 2, 4]


def test_a_set_names_the_patterns_that_match() -> None:
    patterns = PatternSet(["a+", "b", "c"])
    assert patterns.matching(b"xaab") == [0, 1]
    assert patterns.matching(b"") == []


def test_a_set_that_ran_out_of_memory_names_all(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = PatternSet(["a", "b"])
    monkeypatch.setattr(patterns, "_set", SimpleNamespace(Match=lambda _: None))
    assert patterns.matching(b"z") == (0, 1)


def test_a_large_pattern_has_its_automaton() -> None:
    large, data = r"x(?:[\pL\pN][\pL ]{0,40}, ){3}y", "Straßen und x Wörter, ".encode() * 60
    starved = re2.compile(large)
    ours = Pattern(large)
    assert ours.search(data) is None
    assert starved.search(data) is None
    assert 4 * fastest(lambda: ours.search(data)) < fastest(lambda: starved.search(data))


def fastest(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of five calls."""
    return min(timeit.repeat(call, number=1, repeat=5))


def test_reasons_are_words() -> None:
    with pytest.raises(ConfigError, match=r"missing \): \(a"):
        Pattern("(a")


def test_a_search_is_that_of_the_library() -> None:
    rules = [(Pattern(r.pattern), re2.compile(r.pattern)) for r in shipped_rules()]
    met = 0
    for text in texts(60, seed=1):
        data = text.encode()
        for ours, theirs in rules:
            for start in (0, len(data) // 3, len(data)):
                match = theirs.search(data, start)
                hit = ours.search(data, start)
                assert (hit is None) == (match is None)
                if hit is not None:
                    met += 1
                    groups = (match.span(group) for group in range(1, theirs.groups + 1))
                    value = next((span for span in groups if span[0] >= 0), match.span())
                    assert hit == Hit(match.start(), match.end(), value)
    assert met > 200
    assert Pattern("").search(b"", 1) is None
