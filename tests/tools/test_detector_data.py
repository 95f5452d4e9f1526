from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kvkeep.sharing.detector import checks
from kvkeep.sharing.detector.spans import CATEGORIES
from tools.detector_data import development, heldout, training, validation, values
from tools.detector_data.dataset import (
    PROMPT,
    PROSE,
    Sizes,
    _bare,
    passages,
    prompt_parts,
    roughened,
    varied,
)
from tools.detector_data.lists import LISTED, inflected, invented, reserved
from tools.detector_data.passages import KINDS, LANGUAGES, LIMIT, Label, Passage, World

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def train() -> World:
    return training.world()


@pytest.fixture(scope="module")
def check() -> World:
    return validation.world()


def closed_values(world: World) -> set[str]:
    each = world.languages.values()
    return {
        value.casefold()
        for language in each
        for slot in training.CLOSED | validation.CLOSED
        for value in language.values.get(slot, ())
    }


def test_worlds_share_no_template_and_no_listed_value(train: World, check: World) -> None:
    held = heldout.world()
    assert len(held.listed_values()) > 800
    assert len(held.templates()) > 400
    chosen = development.own()
    closed = closed_values(train) | closed_values(held) | closed_values(check)
    for world in (train, check):
        assert not world.templates() & (held.templates() | chosen.templates())
        assert not (world.listed_values() & held.listed_values()) - closed
    assert not train.templates() & check.templates()
    assert not chosen.templates() & held.templates()
    assert not train.listed_values() & chosen.listed_values()


def test_validation_keeps_values_that_training_lacks(train: World, check: World) -> None:
    for lang in LANGUAGES:
        ours, theirs = train.languages[lang].values, check.languages[lang].values
        for slot in LISTED & ours.keys() & theirs.keys():
            shared = {value.casefold() for value in ours[slot] if "<" not in value}
            assert not shared & {value.casefold() for value in theirs[slot]}
        for slot in ("given", "family", "medication", "diagnosis"):
            assert len(theirs[slot]) > 7


def test_every_slot_has_values(train: World, check: World) -> None:
    for world in (train, check, development.world()):
        for lang in LANGUAGES:
            assert all(world.languages[lang].values.values())
            for slot in KINDS:
                assert all(p.labels for p in world.positives(lang, slot, 3))


def test_invented_words_look_like_others_and_are_new() -> None:
    tails = ("ina", "etta", "olo")
    known = [f"{head}{tail}" for head in ("mar", "lor", "ben") for tail in tails] * 6
    made = invented(known, 20, random.Random(1))
    assert made == invented(known, 20, random.Random(1))
    assert all(3 <= len(one) < 13 and one[:3] in {"mar", "lor", "ben"} for one in made)
    assert invented(["few"], 20, random.Random(1)) == []


def test_ukrainian_names_have_cases() -> None:
    assert "Шевчуком" in inflected(["Шевчук"])
    assert "Олени" in inflected(["Олена"])
    assert inflected(["Xyz"]) == []


def test_a_share_of_values_is_reserved_whatever_its_case() -> None:
    values = [f"name{at}" for at in range(800)]
    assert 120 < sum(map(reserved, values)) < 200
    assert all(reserved(value) == reserved(value.upper()) for value in values)


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
    for world in (heldout.world(), train, development.world()):
        for lang in LANGUAGES:
            assert all(not p.labels and not p.target for p in world.negatives(lang, 30))


def test_passages_are_the_same_each_time() -> None:
    def drawn() -> list[Passage]:
        world = heldout.world()
        return [p for lang in LANGUAGES for p in world.positives(lang, "name", 10)]

    assert drawn() == drawn()


def test_values_are_the_same_in_every_process() -> None:
    script = (
        "from tools.detector_data.lists import LOCALES, drawn, foreign\n"
        "print([drawn(lang) for lang in LOCALES], foreign())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


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
        assert label.end - label.start == 7
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


def test_rough_text_keeps_its_labels_places() -> None:
    passage = Passage("ask José Núñez now", "es", (Label(4, 14, "person_name", "person"),), "name")
    seen = set()
    for seed in range(300):
        made = roughened(passage, random.Random(seed))
        (label,) = made.labels
        assert label.end - label.start == 10
        seen.add(made.text)
    assert "ask Jose Nunez now" in seen
    assert len(seen) > 10


def test_a_set_mixes_kinds_lookalikes_and_prose(train: World) -> None:
    prose = dict.fromkeys(LANGUAGES, ("plain text",))
    found = list(passages(train, prose, Sizes(1, 2, 1), 7))
    assert found == list(passages(train, prose, Sizes(1, 2, 1), 7))
    assert len([p for p in found if p.labels]) >= 8 * 15
    assert all(len(p.text) <= LIMIT for p in found)
    assert len([p for p in found if not p.target]) == 8 * 2
    assert [p.text for p in found if p.target == PROSE] == ["plain text"] * 8


def test_training_has_lookalikes_that_are_parts_of_prompts(train: World) -> None:
    for lang in LANGUAGES:
        plain = train.languages[lang].negative
        assert any("BEGIN:VCARD\nFN:" in text for text in plain)
        assert not any("\\n" in text for text in plain)


def test_parts_of_prompts_are_whole_and_short() -> None:
    parts = list(prompt_parts(validation.PROMPTS))
    assert all(0 < len(part.text) <= LIMIT and part.target == PROMPT for part in parts)
    whole = "".join(part.text for part in parts)
    assert "find_part" in whole
    assert "Max Mustermann" in whole
