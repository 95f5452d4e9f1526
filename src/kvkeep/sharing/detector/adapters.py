"""Recognisers made from models that the engine loads: token classifiers and GLiNER.

This package knows no model library: whoever has the model hands over a callable that finds
entities in one piece of text. Long text goes to it in overlapping pieces, none is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.spans import CATEGORIES, Span


class Entity(NamedTuple):
    """What a model found in a piece of text."""

    start: int
    end: int
    label: str
    score: float


Classify = Callable[[str], Sequence[Entity]]

LABELS: Final[Mapping[str, tuple[str, str]]] = {
    "PER": ("person_name", "person"),
    "PERSON": ("person_name", "person"),
    "NAME": ("person_name", "person"),
    "GIVENNAME": ("person_name", "person"),
    "SURNAME": ("person_name", "person"),
    "LOC": ("address", "location"),
    "ADDRESS": ("address", "location"),
    "STREET": ("address", "location"),
    "CITY": ("address", "location"),
    "ORG": ("employer", "employer"),
    "ORGANIZATION": ("employer", "employer"),
    "DATE": ("date", "date"),
    "DATEOFBIRTH": ("date_of_birth", "date"),
    "DISEASE": ("diagnosis", "health"),
    "MEDICATION": ("medication", "health"),
    "EMAIL": ("email", "contact"),
    "PHONE": ("phone", "contact"),
    "TELEPHONENUM": ("phone", "contact"),
    "CREDITCARDNUMBER": ("card", "finance"),
    "PASSWORD": ("password", "credential"),
}
"""Usual labels without their prefix, upper case, no separators."""
GLINER_LABELS: Final = (
    "person",
    "address",
    "organization",
    "date of birth",
    "disease",
    "medication",
    "email",
    "phone",
    "password",
)
"""What a GLiNER model is asked for."""
OTHER: Final = ("entity", "identifier")
"""A label nobody mapped still counts."""


def label_of(label: str) -> str:
    """Return a label as `LABELS` spells it: `B-date_of_birth` becomes `DATEOFBIRTH`."""
    bare = label[2:] if label[:2].upper() in {"B-", "I-", "E-", "S-", "L-", "U-"} else label
    return "".join(c for c in bare.upper() if c.isalnum())


def pieces(text: str, size: int, overlap: int) -> Iterator[tuple[int, str]]:
    """Yield a text's pieces and where they start; two neighbours share `overlap` characters."""
    start = 0
    while True:
        yield start, text[start : start + size]
        if start + size >= len(text):
            return
        start += size - overlap


@dataclass(frozen=True, slots=True)
class ModelRecogniser:
    """A recogniser around a callable that finds entities."""

    classify: Classify
    labels: Mapping[str, tuple[str, str]]
    size: int = 512
    overlap: int = 128
    version: str = "model"
    """What tells this model from others."""

    def __post_init__(self) -> None:
        """Refuse categories nobody knows and pieces that would not advance."""
        for label, (_, category) in self.labels.items():
            if category not in CATEGORIES:
                raise ConfigError(f"labels: {label} has category {category!r}, not a known one")
        if not 0 <= self.overlap < self.size:
            raise ConfigError("overlap: give less than size, and not less than 0")

    def spans(self, text: str) -> list[Span]:
        """Return the spans of all pieces, of equal ones the best score."""
        best: dict[tuple[int, int, str, str], float] = {}
        for start, piece in pieces(text, self.size, self.overlap):
            for entity in self.classify(piece):
                kind, category = self.labels.get(label_of(entity.label), OTHER)
                key = (start + entity.start, start + entity.end, kind, category)
                best[key] = max(best.get(key, 0.0), entity.score)
        return [Span(*key, score, "scorer") for key, score in sorted(best.items())]


class EntityModel(Protocol):
    """What a GLiNER model offers."""

    def predict_entities(
        self, text: str, labels: list[str], threshold: float
    ) -> list[dict[str, object]]:
        """Return start, end, label and score of each entity."""


def gliner_classify(model: EntityModel, labels: Sequence[str], threshold: float) -> Classify:
    """Return the callable of a loaded GLiNER model."""

    def classify(text: str) -> Sequence[Entity]:
        found = model.predict_entities(text, list(labels), threshold=threshold)
        return [
            Entity(
                int(str(one["start"])),
                int(str(one["end"])),
                str(one["label"]),
                float(str(one["score"])),
            )
            for one in found
        ]

    return classify
