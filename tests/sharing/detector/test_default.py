from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvkeep
from kvkeep.sharing.detector import build, scanner
from kvkeep.sharing.detector.default import load_detector
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


def test_other_code_is_another_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What former code cleared is cleared no more after an update: rules alone do not say it."""
    here, code = build.build_digest(), tmp_path / "detector"
    shutil.copytree(Path(build.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__"))
    assert build.build_digest(code) == here
    (code / "normalise.py").write_text("# folds nothing\n")
    build.build_digest.cache_clear()
    assert build.build_digest(code) != here
    before = load_detector(rules_only=True).version
    monkeypatch.setattr(scanner, "build_digest", lambda: "another")
    assert load_detector(rules_only=True).version != before
    monkeypatch.setattr(build, "version", lambda name: f"9.9 of {name}")
    build.build_digest.cache_clear()
    assert build.build_digest() != here
    build.build_digest.cache_clear()
