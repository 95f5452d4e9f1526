from __future__ import annotations

import random

import pytest

from kvkeep.sharing.detector import checks
from kvkeep.sharing.detector.spans import CATEGORIES
from tools.detector_data import heldout, training, values
from tools.detector_data.dataset import PROSE, Sizes, _bare, passages, varied
from tools.detector_data.passages import KINDS, LANGUAGES, LIMIT, Label, Passage, World
from tools.detector_data.split import crossed, split


@pytest.fixture(scope="module")
def train() -> World:
    return training.world()


def closed_values(world: World) -> set[str]:
    each = world.languages.values()
    return {
        value.casefold()
        for language in each
        for slot in training.CLOSED
        for value in language.values.get(slot, ())
    }


def test_worlds_share_no_template_and_no_listed_value(train: World) -> None:
    held = heldout.world()
    assert not train.templates() & held.templates()
    closed = closed_values(train) | closed_values(held)
    assert not (train.listed_values() & held.listed_values()) - closed
    assert len(held.listed_values()) > 800
    assert len(held.templates()) > 400


def test_the_split_parts_templates_and_long_lists(train: World) -> None:
    parts = split(train, 5)
    for lang in LANGUAGES:
        ours, theirs = parts.training.languages[lang], parts.validation.languages[lang]
        assert not set(ours.positive) & set(theirs.positive)
        assert not set(ours.negative) & set(theirs.negative)
        for slot in ("medication", "diagnosis", "given", "family"):
            plain = {value for value in theirs.values[slot] if "<" not in value}
            assert plain
            assert not plain & set(ours.values[slot])


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_kind_has_passages_and_labels_mark_them(lang: str) -> None:
    world = heldout.world()
    for slot, kind in KINDS.items():
        found = list(world.positives(lang, slot, 12))
        assert found or slot == "account"
        for passage in found:
            assert 0 < len(passage.text) <= LIMIT
            assert passage.target == kind.kind
            assert kind.kind in {label.kind for label in passage.labels}
            for label in passage.labels:
                assert label.category in CATEGORIES
                assert passage.text[label.start : label.end].strip()


def test_lookalikes_hold_no_label(train: World) -> None:
    for world in (heldout.world(), train):
        for lang in LANGUAGES:
            assert all(not p.labels and not p.target for p in world.negatives(lang, 30))


def test_passages_are_the_same_each_time() -> None:
    def drawn() -> list[Passage]:
        world = heldout.world()
        return [p for lang in LANGUAGES for p in world.positives(lang, "name", 10)]

    assert drawn() == drawn()


def test_numbers_have_valid_check_digits() -> None:
    rng = random.Random(3)
    for _ in range(50):
        assert checks.card("".join(c for c in values.card(rng, "en") if c.isdigit()))
        number = values.iban(rng, "de").replace(" ", "")
        assert int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1
        assert checks.my_number(values.NATIONAL["ja"](rng))
        assert checks.steuer_id(values.NATIONAL["de"](rng))


def test_a_slot_without_values_is_named() -> None:
    world = heldout.world()
    with pytest.raises(ValueError, match="<nowhere>"):
        world._fill("<nowhere>", world.languages["en"], random.Random(1))


def test_variation_keeps_labels_on_their_text() -> None:
    passage = Passage("call Ann Lee now", "en", (Label(5, 12, "person_name", "person"),), "name")
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        made = varied(passage, ("first line\nsecond line\nthird",), rng)
        (label,) = made.labels
        assert made.text[label.start : label.end].lower() == "ann lee"
        assert len(made.text) <= LIMIT
        seen.add(made.text)
    assert len(seen) > 3


def test_a_value_may_stand_alone_amid_prose() -> None:
    for lang, prose in (("en", "one two three"), ("zh", "保存文件后退出")):
        passage = Passage("x Ann Lee y", lang, (Label(2, 9, "person_name", "person"),), "name")
        made = {_bare(passage, (prose,), random.Random(seed)) for seed in range(20)}
        assert len(made) > 1
        for one in made:
            (label,) = one.labels
            assert one.text[label.start : label.end] == "Ann Lee"
            assert "x" not in one.text


def test_crossed_values_come_from_two() -> None:
    made = crossed(["alpha", "omega", "<slot>"], 5, random.Random(1))
    assert len(made) == 5
    assert all(one[0] in "ao" and one[-1] == "a" for one in made)
    assert crossed(["alone"], 3, random.Random(1)) == []
    assert crossed(["big dog", "old cat"], 1, random.Random(1))[0] in {"big cat", "old dog"}


def test_a_set_mixes_kinds_lookalikes_and_prose(train: World) -> None:
    prose = dict.fromkeys(LANGUAGES, ("plain text",))
    found = list(passages(train, prose, Sizes(1, 2, 1), 7))
    assert found == list(passages(train, prose, Sizes(1, 2, 1), 7))
    assert len([p for p in found if p.labels]) >= 8 * 15
    assert len([p for p in found if not p.target]) == 8 * 2
    assert [p.text for p in found if p.target == PROSE] == ["plain text"] * 8
