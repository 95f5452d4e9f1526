"""The detector as it comes: shipped rules, the learned scorer that reads them, and context."""

from __future__ import annotations

from collections.abc import Iterable

from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.context import ContextRules
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.scanner import Detector, Filter
from kvkeep.sharing.detector.scorer import RulesAndScorer
from kvkeep.sharing.detector.spans import Recogniser


def load_detector(
    organisation: Filter | None = None,
    *,
    rules_only: bool = False,
    more: Iterable[Recogniser] = (),
) -> Detector:
    """Return a detector with everything the package ships, an organisation's rules and `more`."""
    rules = RuleRecogniser(shipped_rules())
    if rules_only:
        return Detector([rules, *more], None, organisation)
    return Detector([RulesAndScorer(rules), *more], ContextRules(), organisation)
