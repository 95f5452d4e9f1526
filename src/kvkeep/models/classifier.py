"""A local token classifier of Hugging Face's format as a callable for the detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from kvkeep.errors import ModelNotFound
from kvkeep.sharing.detector.adapters import Classify, Entity


def load_classifier(folder: Path) -> Classify:
    """Return what finds entities in a piece of text: every token that is not "O", by itself.

    The piece must fit the model's window. Raises ModelNotFound where the folder holds none.
    """
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"classifier: {folder} holds no checkpoint; name a local folder")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForTokenClassification.from_pretrained(folder, local_files_only=True).eval()
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
