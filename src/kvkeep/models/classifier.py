"""Local models that find entities as recognisers: token classifiers and GLiNER's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from kvkeep.errors import CheckpointError, ConfigError, ModelNotFound
from kvkeep.sharing.detector.adapters import (
    GLINER_LABELS,
    LABELS,
    Classify,
    Entity,
    ModelRecogniser,
    gliner_classify,
)
from kvkeep.sharing.detector.spans import CLEAR_BELOW

GLINER: Final = "gliner_config.json"
"""Tells a folder of GLiNER's from one of Hugging Face's."""
_BLOCK_BYTES: Final = 1 << 20


def load_recogniser(folder: Path) -> ModelRecogniser:
    """Return a recogniser around the model in a local folder, named by all of its files' bytes.

    Raises ModelNotFound, CheckpointError, and ConfigError where GLiNER's package is missing.
    """
    load = load_gliner if (folder / GLINER).is_file() else load_classifier
    return ModelRecogniser(load(folder), LABELS, version=digest(folder))


def load_classifier(folder: Path) -> Classify:
    """Return what finds entities in a piece of text: every token that is not "O", by itself.

    The piece must fit the model's window.
    """
    _check(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForTokenClassification.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"classifier: {folder} can't be loaded ({type(error).__name__}); download it again"
        ) from None
    model = model.eval()
    labels: dict[int, str] = model.config.id2label

    def classify(text: str) -> Sequence[Entity]:
        batch = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        places = batch.pop("offset_mapping")[0].tolist()
        with torch.inference_mode():
            chances = model(**batch).logits[0].softmax(-1)
        best = chances.max(-1)
        return [
            Entity(start, end, labels[index], score)
            for (start, end), index, score in zip(
                places, best.indices.tolist(), best.values.tolist()
            )
            if end > start and labels[index] != "O"
        ]

    return classify


def load_gliner(folder: Path) -> Classify:
    """Return what finds entities in a piece of text, by a model of the `gliner` package."""
    if find_spec("gliner") is None:
        raise ConfigError(f"classifier: {folder} holds a GLiNER model; run `pip install gliner`")
    model = import_module("gliner").GLiNER.from_pretrained(str(folder), local_files_only=True)
    return gliner_classify(model, GLINER_LABELS, CLEAR_BELOW)


def digest(folder: Path) -> str:
    """Return what tells a folder's files from others."""
    h = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        h.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                h.update(block)
    return h.hexdigest()


def _check(folder: Path) -> None:
    """Raise where a folder holds no token classifier: another model's labels would be made up."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        raise ModelNotFound(
            f"classifier: {folder} holds no checkpoint; name a local folder"
        ) from None
    architectures = config.get("architectures") or () if isinstance(config, dict) else ()
    if not any(str(name).endswith("ForTokenClassification") for name in architectures):
        raise CheckpointError(
            f"classifier: {folder} holds no token classifier (`architectures`); name another folder"
        )
