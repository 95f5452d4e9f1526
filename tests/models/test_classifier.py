from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvkeep.errors import CheckpointError, ConfigError, ModelNotFound
from kvkeep.models.classifier import GLINER, load_classifier, load_recogniser
from tests.classifiers import save_classifier

STAND_IN = """
class GLiNER:
    @classmethod
    def from_pretrained(cls, folder, local_files_only):
        assert local_files_only
        return cls()

    def predict_entities(self, text, labels, threshold):
        assert threshold == 0.3
        return [{"start": 0, "end": 4, "label": labels[0], "score": 0.9}]
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_classifier(tmp_path)


def test_every_token_that_is_something_becomes_an_entity(checkpoint: Path) -> None:
    found = load_classifier(checkpoint)("my name is anna")
    assert [(one.start, one.end) for one in found] == [(0, 2), (3, 7), (8, 10), (11, 15)]
    assert {one.label for one in found} == {"B-PER"}
    assert all(abs(one.score - 0.7311) < 1e-3 for one in found)


def test_long_text_is_read_in_pieces(checkpoint: Path) -> None:
    text = "my name is anna and i live here " * 50
    spans = load_recogniser(checkpoint).spans(text)
    assert {span.kind for span in spans} == {"person_name"}
    ends = {text.index(" ", at) for at in range(0, len(text) - 1, 32)}
    assert ends <= {span.end for span in spans}


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="local folder"):
        load_recogniser(tmp_path / "none")


def test_labels_that_mean_nothing_are_left_out(checkpoint: Path) -> None:
    save_classifier(checkpoint, bias=-1.0)
    assert load_classifier(checkpoint)("my name is anna") == []


def test_other_weights_are_another_version(checkpoint: Path, tmp_path: Path) -> None:
    first = load_recogniser(checkpoint).version
    assert load_recogniser(checkpoint).version == first
    assert load_recogniser(save_classifier(checkpoint, bias=0.5)).version != first


def test_a_model_without_labels_of_its_own_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(CheckpointError, match="no token classifier"):
        load_recogniser(checkpoint)


def test_a_folder_that_lacks_its_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load_recogniser(checkpoint)


def test_gliner_needs_its_package(tmp_path: Path) -> None:
    (tmp_path / GLINER).write_text("{}")
    with pytest.raises(ConfigError, match="pip install gliner"):
        load_recogniser(tmp_path)


def test_gliner_is_asked_for_what_the_detector_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name stands in for it: what is loaded, and what it is asked."""
    package, folder = tmp_path / "package", tmp_path / "model"
    package.mkdir()
    folder.mkdir()
    (folder / GLINER).write_text("{}")
    (package / "gliner.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(package))
    (span,) = load_recogniser(folder).spans("anna is here")
    assert (span.start, span.end, span.kind, span.score) == (0, 4, "person_name", 0.9)
    monkeypatch.delitem(sys.modules, "gliner")
