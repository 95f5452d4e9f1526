"""An organisation's rules inside a whole engine: taken at an epoch's end, or refused in words."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from kvkeep.cli.engine import engine_options
from kvkeep.config import load
from kvkeep.engine.build import Parts, build_core, default_parts
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.options import EngineOptions, PolicyName, SharingOptions
from kvkeep.engine.sharing import inspector_of, rules_of
from kvkeep.errors import ConfigError
from kvkeep.models.text import TextModel
from kvkeep.sharing.detector.default import load_detector
from kvkeep.sharing.inspection import Detects
from tests.classifiers import save_classifier
from tests.engine.test_sharing import NAMES, TEMPLATE, cached, end_epochs, send, terms

FALCON = '[[words]]\nwords = ["falcon"]\n'
WEATHER = '[[words]]\nwords = ["weather"]\n'


def write(path: Path, text: str, at: int) -> Path:
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(at, at))
    return path


def built(model: Path, rules: Path) -> tuple[EngineCore, list[int]]:
    """Return an engine whose detector has the shipped rules and a file's, and a prompt."""
    share = SharingOptions(policy="selective", rules=str(rules))
    engine = EngineOptions(model=str(model), threads=2, kv_cache_bytes=64 << 20, share=share)
    file = rules_of(share)
    parts = Parts(
        techniques=default_parts(EngineOptions(model=str(model))).techniques,
        inspector=Detects(load_detector(file, rules_only=True)),
        rules=file,
    )
    core = build_core(engine, parts=parts)
    core.set_tenants(dict.fromkeys(NAMES, 0.1), terms())
    return core, TextModel.load(model).encode(TEMPLATE)[:600]


def test_a_changed_file_takes_effect_at_an_epochs_end_and_a_broken_one_does_not(
    tiny: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "org.toml", FALCON, 1)
    core, prompt = built(tiny["llama"], path)
    for name in "abcd":
        send(core, name, prompt)
    end_epochs(core)
    assert cached(core, "x", prompt) == (0, 512)

    write(path, f"{WEATHER}colour = 1\n", 2)
    with caplog.at_level(logging.WARNING):
        end_epochs(core)
    (line,) = caplog.messages
    assert line.startswith(f"share_rules: {path}:3: ")
    assert "colour" in line
    assert line.endswith("the rules in force stay")
    assert core.stats().sharing.public_units == 2

    write(path, WEATHER, 3)
    end_epochs(core, 1)
    assert core.stats().sharing.public_pages == 0
    assert cached(core, "e", prompt) == (0, 0), "from the first page on"
    for name in NAMES:
        send(core, name, prompt)
    end_epochs(core)
    assert core.stats().sharing.public_units == 0, "the word is in the text"
    core.close()


def test_a_broken_file_is_refused_at_the_start_with_line_and_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "org.toml", '\n[[words]]\nword = "a"\n', 1)
    options = engine_options(load({"share_rules": path, "no_auth": True}))
    with pytest.raises(ConfigError, match=r"^share_rules: .*org\.toml:3: .*did you mean 'words'"):
        default_parts(options)
    gone = SharingOptions(policy="dp", rules=str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match=r"share_rules: .*cannot be read"):
        rules_of(gone)
    assert rules_of(SharingOptions(policy="selective")) is None


def test_a_classifier_reads_prompts_too(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "model")
    options = engine_options(load({"share_classifier": model, "no_auth": True})).share
    alone, with_it = inspector_of(SharingOptions(policy="selective")), inspector_of(options)
    assert alone.first_doubt("and i live here") is None
    assert with_it.first_doubt("and i live here") == 0
    assert alone.version != with_it.version
    needless = SharingOptions(policy="isolate", classifier=str(model))
    with pytest.raises(ConfigError, match="share_classifier: 'isolate' reads no prompts"):
        inspector_of(needless)


@pytest.mark.parametrize("policy", ["isolate", "pinned", "salt", "share_all"])
def test_rules_that_nothing_would_read_are_refused(policy: PolicyName, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"share_rules: '{policy}' reads no prompts"):
        rules_of(SharingOptions(policy=policy, rules=str(write(tmp_path / "org.toml", FALCON, 1))))
