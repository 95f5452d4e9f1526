from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.normalise import LOOKALIKES
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.scanner import CARRY, LONGEST_CARRY, ChainScanner, Detector
from kvkeep.sharing.detector.spans import Span, Verdict
from tests.counts import examples

RULES = RuleRecogniser(shipped_rules())
DETECTOR = Detector([RULES])
SECRETS = [
    "anna.berg@firma.de",
    "4666 1760 3137 2159",
    "AKIAQYLPMN5HFIQR7XYA",
    "DE69 7483 3801 4126 9060 44",
    "マイナンバーは1735 7044 2793です",
    "４６６６１７６０３１３７２１５９",
    "4 6 6 6 1 7 6 0 3 1 3 7 2 1 5 9",
    '"a n n a . b e r g @ f i r m a . d e".',
    "an\u200bna.be\u00adrg@fir\u200bma.de",
    "anna.bеrg@firmа.de",
]


class Breaks:
    """Fails on text that holds a word."""

    def spans(self, text: str) -> list[Span]:
        if "boom" in text:
            raise RuntimeError("boom")
        return []


def feed(scanner: ChainScanner, *parts: str) -> list[Span]:
    return [span for part in parts for span in scanner.feed(part)]


def tainted(spans: Sequence[Span], start: int, end: int) -> bool:
    return any(s.verdict is not Verdict.CLEAR and s.start < end and start < s.end for s in spans)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_found_wherever_a_long_text_is_split(secret: str) -> None:
    before = "The server reads its settings from a file. " * 12
    text = f"{before}{secret} and so on, as the manual says."
    place = len(before), len(before) + len(secret)
    whole = DETECTOR.scan(text)
    assert tainted(whole.spans, *place)
    for split in range(place[0] - 2, place[1] + 3):
        spans = feed(DETECTOR.scanner(), text[:split], text[split:])
        assert set(whole.spans) <= set(spans)
        assert tainted(spans, *place)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_secret_is_found_in_pieces_of_any_size(secret: str, size: int) -> None:
    text = "x " * 300 + secret + " y" * 40
    scanner = DETECTOR.scanner()
    spans = feed(scanner, *(text[i : i + size] for i in range(0, len(text), size)))
    assert tainted(spans, 600, 600 + len(secret))
    assert scanner.verdict is Verdict.TAINT


def test_offsets_are_absolute_and_nothing_is_reported_twice() -> None:
    scanner = DETECTOR.scanner()
    assert scanner.feed("a" * 1000 + " ") == ()
    (span,) = scanner.feed("write to anna.berg@firma.de now")
    assert (span.start, span.end, span.kind) == (1010, 1028, "email")
    assert scanner.feed(" and nothing more") == ()
    assert scanner.scanned == 1049


def test_branches_go_on_alone() -> None:
    trunk = DETECTOR.scanner()
    trunk.feed("mail anna.berg@fir")
    one, two = trunk.copy(), trunk.copy()
    assert tainted(one.feed("ma.de"), 5, 20)
    assert not any(span.kind == "email" for span in two.feed(" is no address"))
    assert (one.verdict, two.verdict) == (Verdict.TAINT, Verdict.CLEAR)
    assert trunk.scanned == 18


@pytest.mark.parametrize(
    "text", ["", "half a lette\ufffd", "\ud83d alone", "a\ufffdb and some more text"]
)
def test_empty_and_undecodable_text_is_never_clear(text: str) -> None:
    scanner = DETECTOR.scanner()
    scanner.feed("before ")
    (span,) = scanner.feed(text)
    assert span.verdict is Verdict.GREY
    assert 7 <= span.start <= span.end <= scanner.scanned
    assert scanner.verdict is Verdict.GREY


def test_an_undecodable_character_is_reported_once() -> None:
    scanner = DETECTOR.scanner()
    assert len(scanner.feed("a\ufffdb")) == 1
    assert scanner.feed(" more") == ()


def test_a_failure_taints_everything_from_there_on() -> None:
    scanner = Detector([Breaks(), RULES]).scanner()
    assert scanner.feed("calm ") == ()
    (span,) = scanner.feed("then boom and more")
    assert (span.start, span.end, span.verdict) == (0, 23, Verdict.TAINT)
    (after,) = scanner.feed(" quiet")
    assert (after.start, after.end, after.kind) == (23, 29, "detector_error")
    (branch,) = scanner.copy().feed("x")
    assert branch.verdict is Verdict.TAINT
    assert scanner.verdict is Verdict.TAINT


def test_text_full_of_invisible_characters_is_not_read_across_an_edge() -> None:
    scanner = DETECTOR.scanner()
    (span,) = scanner.feed("secret" + "\u200b" * (LONGEST_CARRY + 1))
    assert span.kind == "detector_error"


def test_invisible_characters_do_not_push_a_secret_out_of_the_carry() -> None:
    digits = "4666176031372159"
    hidden = ("\u200b" * 60).join(digits)
    assert len(hidden) > 2 * CARRY
    for split in range(100, len(hidden), 97):
        scanner = DETECTOR.scanner()
        feed(scanner, hidden[:split], hidden[split:])
        assert scanner.verdict is Verdict.TAINT


class Pairs:
    """A context that taints two spans of the last turns."""

    version = "fake"

    def combine(self, spans: Sequence[Span]) -> list[Span]:
        if len(spans) < 2:
            return []
        last = max(span.end for span in spans)
        return [Span(spans[0].start, last, "combination", "person", 0.9, "context")]


def test_the_context_sees_the_spans_of_earlier_turns() -> None:
    detector = Detector([RULES], context=Pairs())
    scanner = detector.scanner()
    first = scanner.feed("mail anna.berg@firma.de. ")
    assert [span.kind for span in first] == ["email"]
    second = scanner.feed("x " * 200 + "card 4666 1760 3137 2159")
    assert {"credit_card", "combination"} == {span.kind for span in second}
    assert detector.version != DETECTOR.version


PIECES = st.lists(
    st.sampled_from([*SECRETS, " ", "ok ", "\u200b", "４", "а", "-", "1", "@", ". ", "です"])
    | st.text(max_size=12),
    max_size=14,
)


@settings(max_examples=examples(60, 150), deadline=None)
@given(PIECES, st.integers(1, 200))
def test_splitting_never_moves_text_to_clear(pieces: list[str], at: int) -> None:
    text = "".join(pieces)
    split = at % (len(text) + 1)
    whole = DETECTOR.scan(text)
    scanner = DETECTOR.scanner()
    spans = feed(scanner, text[:split], text[split:])
    assert scanner.verdict >= whole.verdict
    for span in whole.spans:
        if span.kind not in {"undecodable", "empty"}:
            assert tainted(spans, span.start, span.end)


ALIKE = {plain: letter for letter, plain in LOOKALIKES.items()}
WIDE = {chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)}
HIDDEN = ("\u200b", "\u00ad", "\u2060", "\ufe0f")


def disguised(secret: str, chance: random.Random) -> str:
    """Write some characters wide, hide others behind invisible ones; one letter is another's."""
    letters = [i for i, c in enumerate(secret) if c in ALIKE]
    swapped = chance.choice([*letters, None])
    found = []
    for i, char in enumerate(secret):
        plain = ALIKE[char] if i == swapped else char
        found.append(chance.choice([plain, plain, WIDE.get(plain, plain)]))
        found += chance.choices(HIDDEN, k=chance.choice([0, 0, 1, 3]))
    return "".join(found)


@settings(max_examples=examples(60, 600), deadline=None)
@given(st.sampled_from(SECRETS[:4]), st.integers(0, 1 << 32), st.integers(0, 200))
def test_no_disguise_moves_a_secret_to_clear(secret: str, seed: int, at: int) -> None:
    text = f"see {disguised(secret, random.Random(seed))} there"
    scanner = DETECTOR.scanner()
    split = at % len(text)
    spans = feed(scanner, text[:split], text[split:])
    assert tainted(spans, 4, len(text) - 6), text


@settings(max_examples=examples(60, 150), deadline=None)
@given(st.lists(st.text(st.characters(), max_size=40), max_size=6))
def test_no_text_raises(pieces: list[str]) -> None:
    scanner = DETECTOR.scanner()
    for span in feed(scanner, *pieces):
        assert 0 <= span.start <= span.end <= scanner.scanned
        assert span.kind != "detector_error"
