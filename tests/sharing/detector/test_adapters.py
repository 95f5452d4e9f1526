from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.adapters import (
    LABELS,
    Entity,
    ModelRecogniser,
    gliner_classify,
    label_of,
    pieces,
)
from kvkeep.sharing.detector.spans import Span


def find_marks(text: str) -> Sequence[Entity]:
    return [Entity(at, at + 1, "B-PER", 0.8) for at, c in enumerate(text) if c == "#"]


@pytest.mark.parametrize(
    ("label", "bare"),
    [("B-PER", "PER"), ("I-date_of_birth", "DATEOFBIRTH"), ("city", "CITY"), ("LOC", "LOC")],
)
def test_labels_lose_prefix_and_case(label: str, bare: str) -> None:
    assert label_of(label) == bare


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 900, 4096])
def test_no_character_is_left_out(length: int) -> None:
    text = "".join(chr(97 + at % 26) for at in range(length))
    covered = set[int]()
    for start, piece in pieces(text, 512, 128):
        assert text[start : start + len(piece)] == piece
        covered |= set(range(start, start + len(piece)))
    assert covered == set(range(length))


def test_spans_have_the_texts_own_offsets_and_no_doubles() -> None:
    text = "." * 450 + "#" + "." * 300 + "#"
    found = ModelRecogniser(find_marks, LABELS).spans(text)
    assert found == [Span(at, at + 1, "person_name", "person", 0.8, "scorer") for at in (450, 751)]


def test_the_better_of_two_scores_is_kept() -> None:
    def unsure(text: str) -> Sequence[Entity]:
        return [Entity(0, 1, "PER", 0.4), Entity(0, 1, "PER", 0.9)]

    assert [span.score for span in ModelRecogniser(unsure, LABELS).spans("a")] == [0.9]


def test_an_unknown_label_still_counts() -> None:
    recogniser = ModelRecogniser(lambda _: [Entity(0, 3, "B-SHOE_SIZE", 0.9)], LABELS)
    assert recogniser.spans("abc") == [Span(0, 3, "entity", "identifier", 0.9, "scorer")]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="labels"):
        ModelRecogniser(find_marks, {"PER": ("name", "people")})
    with pytest.raises(ConfigError, match="overlap"):
        ModelRecogniser(find_marks, LABELS, size=10, overlap=10)


def test_gliner_models_are_asked_with_labels_and_threshold() -> None:
    class Fake:
        def predict_entities(
            self, text: str, labels: list[str], threshold: float
        ) -> list[dict[str, object]]:
            assert labels == ["person"]
            assert threshold == 0.3
            return [{"start": 2, "end": 5, "label": "person", "score": 0.75, "text": text}]

    classify = gliner_classify(Fake(), ["person"], 0.3)
    assert classify("I Bob") == [Entity(2, 5, "person", 0.75)]
    assert ModelRecogniser(classify, LABELS).spans("I Bob")[0].kind == "person_name"
