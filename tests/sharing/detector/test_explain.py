from __future__ import annotations

from collections.abc import Sequence

from kvkeep.sharing.detector.default import load_detector
from kvkeep.sharing.detector.explain import explain
from kvkeep.sharing.detector.organisation import parse_organisation
from kvkeep.sharing.detector.scanner import Detector
from kvkeep.sharing.detector.spans import Span

RULES = load_detector(rules_only=True)


def test_a_rule_is_named_with_its_conditions_and_source() -> None:
    (card,) = explain(RULES, "４６６６ １７６０ ３１３７ ２１５９")[:1]
    assert card.reason == "rule card (check card, ISO/IEC 7812)"
    (key,) = explain(RULES, "AKIAQYLPMN5HFIQR7XYA")
    assert "entropy of 2.8 bits" in key.reason
    (plate,) = explain(RULES, "license plate 8FKT204")
    assert "a context word" in plate.reason
    (mobile,) = explain(RULES, "手机13848291337")[:1]
    assert "context raises it" in mobile.reason


class Everything:
    def spans(self, text: str) -> list[Span]:
        return [Span(0, len(text), "thing", "person", 0.5, "scorer")]

    version = "fake"

    def combine(self, spans: Sequence[Span]) -> list[Span]:
        return [Span(0, 1, "combination", "person", 0.9, "context")]


def test_other_parts_are_named() -> None:
    words = parse_organisation("o.toml", '[[words]]\nwords = ["falcon"]\n')
    found = explain(Detector([Everything()], Everything(), words), "falcon")
    assert {item.reason for item in found} == {
        "the learned scorer",
        "details that point at a person together",
        "the organisation's own rules",
    }


def test_what_no_part_claims_is_named_by_its_kind() -> None:
    (item,) = explain(RULES, "\ufffd")
    assert item.reason == "undecodable"
