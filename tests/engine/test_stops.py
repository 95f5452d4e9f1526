"""Stop strings across pieces, stop tokens and minimum lengths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.engine.api import SamplingParams
from kvkeep.engine.stops import StopChecker, StopStrings

EOS = 0


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Return where the first stop to be complete begins, by trying every end."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return end - len(longest), longest
    return None


@st.composite
def pieces_of_text(draw: st.DrawFn) -> list[str]:
    text = draw(st.text("ab<é", max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(
    pieces=pieces_of_text(),
    stops=st.lists(st.text("ab<é", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_what_is_sent_is_the_text_up_to_the_first_stop(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    text = "".join(pieces)
    expected = first_stop(text, stops)
    finder = StopStrings(stops, include=include)
    sent, match, arrived = "", None, ""
    for piece in pieces:
        emitted = finder.push(piece)
        arrived += piece
        sent += emitted.text
        match = emitted.match
        if match is not None:
            break
        assert sent + finder.held == arrived
        assert not finder.held or any(s.startswith(finder.held) for s in stops)
    if expected is None:
        assert match is None
        assert sent + finder.flush() == text
        assert finder.flush() == ""
    else:
        start, stop = expected
        assert match == stop
        assert sent == text[: start + len(stop) if include else start]
        assert finder.flush() == ""


@given(pieces=pieces_of_text(), stops=st.lists(st.text("ab", min_size=2, max_size=4), min_size=1))
def test_nothing_is_held_back_longer_than_needed(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    for piece in pieces:
        if finder.push(piece).match is not None:
            return
        assert len(finder.held) < max(map(len, stops))
    if pieces[-1].endswith("<"):
        assert finder.held == ""


def test_without_stops_text_passes_at_once() -> None:
    finder = StopStrings(["", ""])
    assert finder.push("abc") == ("abc", None)
    assert finder.held == ""


def checker(**settings: object) -> StopChecker:
    return StopChecker(SamplingParams(**settings), [EOS])  # type: ignore[arg-type]


def test_a_stop_string_across_tokens() -> None:
    stops = checker(stop=("END",))
    assert stops.push(5, "one E") == ("one ", False, None)
    assert stops.push(6, "N") == ("", False, None)
    assert stops.push(7, "T") == ("ENT", False, None)
    assert stops.push(8, " EN") == (" ", False, None)
    assert stops.push(9, "D and more") == ("", True, "END")


def test_the_end_token_lets_go_of_what_was_held() -> None:
    stops = checker(stop=("END",))
    assert stops.push(5, "E").text == ""
    assert stops.push(EOS, "</s>") == ("E", True, None)


@pytest.mark.parametrize(("include", "text"), [(False, ""), (True, "!")])
def test_a_stop_token_is_named_and_its_text_sent_only_on_request(include: bool, text: str) -> None:
    stops = checker(stop_token_ids=(4,), include_stop=include)
    assert stops.ends_with(4)
    assert stops.push(4, "!") == (text, True, 4)


def test_ignored_end_token_goes_on() -> None:
    assert checker(ignore_eos=True).push(EOS, "</s>") == ("</s>", False, None)


def test_min_tokens_counts_generated_tokens() -> None:
    stops = checker(stop=("x",), min_tokens=2)
    assert not stops.ends_with(EOS)
    assert stops.push(1, "x") == ("x", False, None)
    assert stops.push(2, "x") == ("", True, "x")
    ending = checker(min_tokens=1)
    assert ending.push(EOS, "a") == ("a", False, None)
    assert ending.push(EOS, "b") == ("", True, None)


def test_finishing_flushes_and_still_finds_a_stop() -> None:
    plain = checker(stop=("END",))
    plain.push(1, "EN")
    assert plain.finish() == ("EN", False, None)
    late = checker(stop=("END",))
    late.push(1, "EN")
    assert late.finish("D!") == ("", True, "END")
