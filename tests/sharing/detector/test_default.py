from __future__ import annotations

import subprocess
import sys

import kvkeep
from kvkeep.sharing.detector.default import load_detector, optional_part
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.spans import Verdict


def test_the_public_names_scan_a_text() -> None:
    detector = kvkeep.load_detector()
    assert isinstance(detector, kvkeep.Detector)
    assert detector.scan("write to anna.berg@firma.de").verdict is Verdict.TAINT
    assert detector.scan("write to the server's operator").verdict is Verdict.CLEAR


def test_rules_alone_are_the_floor() -> None:
    detector = load_detector(rules_only=True)
    assert [type(part) for part in detector.recognisers] == [RuleRecogniser]
    assert detector.context is None
    assert detector.version == load_detector(rules_only=True).version


def test_another_process_names_the_same_detector_alike() -> None:
    """Votes outlive a restart only where it does."""
    told = "import kvkeep; print(kvkeep.load_detector().version)"
    seeds = {"PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", told], env=seeds, capture_output=True, check=True)
    assert other.stdout.decode().strip() == kvkeep.load_detector().version


def test_a_part_that_is_not_there_is_left_out() -> None:
    assert optional_part("no_such_part", "Anything") is None
