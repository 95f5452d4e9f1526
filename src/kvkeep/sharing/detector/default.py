"""The detector as it comes: shipped rules, and the learned scorer and context where present."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.scanner import Detector, Filter
from kvkeep.sharing.detector.spans import Recogniser

_PACKAGE: Final = "kvkeep.sharing.detector"


def load_detector(
    organisation: Filter | None = None,
    *,
    rules_only: bool = False,
    more: Iterable[Recogniser] = (),
) -> Detector:
    """Return a detector with everything the package ships, an organisation's rules and `more`."""
    recognisers: list[Recogniser] = [RuleRecogniser(shipped_rules())]
    scorer = None if rules_only else optional_part("scorer", "LearnedScorer")
    if scorer is not None:
        recognisers.append(scorer)
    context = None if rules_only else optional_part("context", "ContextRules")
    return Detector([*recognisers, *more], context, organisation)


def optional_part(module: str, name: str) -> Any:
    """Return an instance of a part of the package; None where it comes without that part."""
    if find_spec(f"{_PACKAGE}.{module}") is None:
        return None
    return getattr(import_module(f"{_PACKAGE}.{module}"), name)()
