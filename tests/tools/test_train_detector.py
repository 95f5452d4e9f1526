from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.features import FEATURES, Lexicon, tokenise
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.scorer import Hints, LearnedScorer, digest_of, load_weights
from tools.detector_data.passages import Label, Passage
from tools.train_detector import (
    GAP,
    Example,
    Plan,
    Tagger,
    arrays_of,
    batches,
    encode,
    judged,
    kept,
    save,
    thinned,
    train,
)

KINDS = [("person_name", "person"), ("diagnosis", "health")]
CLASSES = {"person_name": 1, "diagnosis": 2}
PASSAGES = [
    Passage("call Ann Lee now", "en", (Label(5, 12, "person_name", "person"),), "person_name"),
    Passage("has asthma since May", "en", (Label(4, 10, "diagnosis", "health"),), "diagnosis"),
    Passage("the file was saved", "en"),
]
NONE = RuleRecogniser(())
KNOWN = Lexicon.of([["Ann"]])


def encoded(passage: Passage) -> Example:
    return encode(passage, CLASSES, KNOWN, Hints(NONE))


@pytest.fixture(scope="module")
def model() -> Tagger:
    return train([encoded(p) for p in PASSAGES], 3, Plan(epochs=30, batch_tokens=8), 1)


def meta(slope: float = 1.0) -> dict[str, object]:
    return {"kinds": KINDS, "slopes": [slope] * 2, "offsets": [0.0] * 2}


def test_labels_become_classes_of_the_tokens_they_touch() -> None:
    example = encoded(PASSAGES[0])
    assert example.classes.tolist() == [0, 1, 1, 0]
    assert example.features.shape == (4, FEATURES)


def test_batches_hold_every_example_once_with_gaps_between() -> None:
    examples = [
        Example(np.full((n, FEATURES), n, np.int32), np.full(n, n, np.int64)) for n in (2, 3, 4, 5)
    ]
    found = list(batches(examples, 6, np.random.default_rng(0)))
    classes = np.concatenate([target.numpy() for _, target in found])
    assert sorted(classes[classes >= 0]) == [2] * 2 + [3] * 3 + [4] * 4 + [5] * 5
    for rows, target in found:
        assert (rows[target < 0] == 0).all()
        assert (target[-GAP:] < 0).all()


def test_training_is_the_same_for_one_seed(model: Tagger) -> None:
    again = train([encoded(p) for p in PASSAGES], 3, Plan(epochs=30, batch_tokens=8), 1)
    assert digest_of(arrays_of(model, KNOWN), {}) == digest_of(arrays_of(again, KNOWN), {})


def test_numpy_scores_what_torch_trained(model: Tagger, tmp_path: Path) -> None:
    weights = save(tmp_path / "deep" / "w.npz", arrays_of(model, KNOWN), meta())
    assert not weights.table[0].any()
    tokens = tokenise("call Ann Lee, she has asthma. " * 40)
    ours = LearnedScorer(NONE, weights).logits(tokens)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens.features), torch.ones(len(tokens.starts), 1)).numpy()
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.99


def test_what_was_learned_is_found(model: Tagger, tmp_path: Path) -> None:
    weights = save(tmp_path / "w.npz", arrays_of(model, KNOWN), meta())
    found = judged(weights, NONE, PASSAGES)
    assert [sorted(one.kinds) for one in found] == [["person_name"], ["diagnosis"], []]
    assert found[0].odds[0] > 0
    assert found[1].odds[1] > 0
    assert max(found[2].odds) < 0


def test_stored_weights_read_back_and_tell_calibrations_apart(
    model: Tagger, tmp_path: Path
) -> None:
    one = save(tmp_path / "a.npz", arrays_of(model, KNOWN), meta(1.0))
    other = save(tmp_path / "b.npz", arrays_of(model, KNOWN), meta(2.0))
    assert load_weights(tmp_path / "a.npz").slopes.tolist() == [1.0, 1.0]
    assert other.slopes.tolist() == [2.0, 2.0]
    assert one.digest != other.digest
    assert one.kinds == tuple(KINDS)


def test_kept_weights_come_without_their_bounds(model: Tagger, tmp_path: Path) -> None:
    told = {"kinds": KINDS, "prose": "x", "passages": 3, "tokens": 9}
    arrays = arrays_of(model, KNOWN)
    save(tmp_path / "w.npz", arrays, told | {"slopes": [1.0] * 2, "offsets": [0.0] * 2})
    same, meta_kept = kept(tmp_path / "w.npz")
    assert meta_kept.keys() == told.keys()
    assert all(np.array_equal(arrays[name], same[name]) for name in arrays)


def test_what_rules_and_lexicon_know_is_in_an_example() -> None:
    rules = RuleRecogniser([rule for rule in shipped_rules() if rule.id == "en-labelled-name"])
    passage = Passage("My name is Ann Lee", "en", (Label(11, 18, "person_name", "person"),), "x")
    rows = encode(passage, CLASSES, KNOWN, Hints(rules)).features
    assert (rows[:, -1] > 0).tolist() == [False] * 3 + [True] * 2
    assert (rows[:, -3] > 0).tolist() == [False] * 3 + [True, False]


def test_some_features_are_hidden_in_training_and_none_is_made_up() -> None:
    torch.manual_seed(3)
    rows = torch.ones(4000, FEATURES, dtype=torch.int32)
    target = torch.arange(4000) // 4 % 3
    kept = thinned(rows, target)
    shares = 1 - kept.float().mean(0)
    assert 0.1 < shares[0] < shares[-2] < shares[13] < 0.7
    assert 0.2 < shares[-1] < 0.6
    whole = kept.sum(1) == 0
    assert whole[target > 0].float().mean() > whole[target == 0].float().mean()
    assert rows.all()
