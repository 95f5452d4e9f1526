"""Say why a text is private: which rule, which part of the detector."""

from __future__ import annotations

from typing import NamedTuple

from kvkeep.sharing.detector.catalogue import Rule
from kvkeep.sharing.detector.normalise import views
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.scanner import Detector
from kvkeep.sharing.detector.scorer import RulesAndScorer
from kvkeep.sharing.detector.spans import Span


class Explained(NamedTuple):
    """A span and what found it."""

    span: Span
    reason: str


_OTHERS = {
    "scorer": "the learned scorer",
    "context": "details that point at a person together",
    "organisation": "the organisation's own rules",
}


def explain(detector: Detector, text: str) -> list[Explained]:
    """Return every span of a text, in order, each with its reason."""
    rules = _rules(detector, text)
    explained = []
    for span in detector.scan(text).spans:
        rule = rules.get(span)
        reason = _OTHERS.get(span.source, span.kind) if rule is None else _reason(rule)
        explained.append(Explained(span, reason))
    return explained


def _rules(detector: Detector, text: str) -> dict[Span, Rule]:
    found: dict[Span, Rule] = {}
    parts = (p.rules if isinstance(p, RulesAndScorer) else p for p in detector.recognisers)
    recognisers = [part for part in parts if isinstance(part, RuleRecogniser)]
    for view in views(text):
        for recogniser in recognisers:
            for rule, span in recogniser.explained(view.text):
                start, end = view.original(span.start, span.end)
                found.setdefault(span._replace(start=start, end=end), rule)
    return found


def _reason(rule: Rule) -> str:
    conditions = [f"check {' or '.join(rule.check)}"] if rule.check else []
    if rule.entropy:
        conditions.append(f"entropy of {rule.entropy:g} bits")
    if rule.context:
        conditions.append("a context word" if not rule.alone else "context raises it")
    return f"rule {rule.id} ({', '.join([*conditions, rule.source])})"
