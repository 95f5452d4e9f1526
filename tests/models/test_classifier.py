from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from kvkeep.errors import ModelNotFound
from kvkeep.models.classifier import load_classifier
from kvkeep.sharing.detector.adapters import LABELS, ModelRecogniser

WORDS = ("[UNK]", "my", "name", "is", "anna", "and", "i", "live", "here")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "O", 1: "B-PER"},
        label2id={"O": 0, "B-PER": 1},
    )
    model = BertForTokenClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_every_token_that_is_something_becomes_an_entity(checkpoint: Path) -> None:
    found = load_classifier(checkpoint)("my name is anna")
    assert [(one.start, one.end) for one in found] == [(0, 2), (3, 7), (8, 10), (11, 15)]
    assert {one.label for one in found} == {"B-PER"}
    assert all(abs(one.score - 0.7311) < 1e-3 for one in found)


def test_long_text_is_read_in_pieces(checkpoint: Path) -> None:
    text = "my name is anna and i live here " * 50
    spans = ModelRecogniser(load_classifier(checkpoint), LABELS).spans(text)
    assert {span.kind for span in spans} == {"person_name"}
    ends = {text.index(" ", at) for at in range(0, len(text) - 1, 32)}
    assert ends <= {span.end for span in spans}


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="local folder"):
        load_classifier(tmp_path / "none")


def test_labels_that_mean_nothing_are_left_out(checkpoint: Path) -> None:
    model = BertForTokenClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    model.save_pretrained(checkpoint)
    assert load_classifier(checkpoint)("my name is anna") == []
