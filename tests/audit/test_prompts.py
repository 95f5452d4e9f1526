from __future__ import annotations

from collections import Counter

import pytest

from kvkeep.audit.prompts import BLANKS, PAGE_TOKENS, WORDS, PromptMaker, Twins
from kvkeep.sharing.detector.default import load_detector
from kvkeep.sharing.inspection import Detects


def maker(seed: int = 1, tokens: int = 256, behind: str = "") -> PromptMaker:
    made = PromptMaker(seed, behind)
    made.tokens, made.tokens_per_word = tokens, 2.0
    return made


def test_twins_have_the_same_words_and_part_at_the_second() -> None:
    one, other = (text.split() for text in maker().twins())
    assert Counter(one) == Counter(other)
    assert len(one) == 128
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert one[3:] != other[3:]


def test_prompts_begin_with_what_they_are_to_stand_behind() -> None:
    made = maker(behind="You are a helpful assistant.")
    for text in (made.text(), *made.twins()):
        assert text.startswith("You are a helpful assistant. ")
    bare = made.bare_twins().first
    assert len(bare.split()) == 128
    assert "assistant" not in bare


def test_the_shipped_detector_finds_nothing_in_most_prompts() -> None:
    inspector = Detects(load_detector())
    made = maker(tokens=512)
    assert sum(inspector.first_doubt(made.text()) is None for _ in range(30)) >= 26


def test_texts_that_look_empty_part_too() -> None:
    one, other = maker().blanks()
    assert set(one + other) <= set(BLANKS)
    assert Counter(one) == Counter(other)
    assert len(one) == 128
    assert one[1] != other[1]


def test_guesses_differ_in_two_words() -> None:
    one, other = (text.split() for text in maker().guesses(50))
    assert one[:2] == other[1::-1]
    assert one[0] != one[1]
    assert one[2:] == other[2:]
    assert len(one) == 52


def test_a_near_text_has_one_early_word_exchanged() -> None:
    text = maker().twins().first
    near = maker().near(text)
    assert Counter(near.split()) == Counter(text.split())
    assert near.split()[3] != text.split()[3]
    assert sum(a != b for a, b in zip(near.split(), text.split(), strict=True)) == 2


@pytest.mark.parametrize("per_word", [1.0, 1.3, 2.5])
def test_a_secret_begins_before_a_page_ends_and_ends_behind_it(per_word: float) -> None:
    made = maker()
    made.tokens_per_word = per_word
    text = made.across_boundary(made.twins().first, "SECRET")
    begins = text.split().index("SECRET") * per_word
    assert PAGE_TOKENS - 5 * per_word - 1 <= begins < PAGE_TOKENS


def test_no_prompt_comes_twice() -> None:
    made = maker()
    texts = [text for _ in range(200) for text in (*made.twins(), made.text())]
    assert len(set(texts)) == len(texts)


def test_a_seed_repeats_everything_but_templates_do_not_move_it() -> None:
    def drawn(made: PromptMaker) -> tuple[Twins, str, str]:
        return made.twins(), made.secret(), made.template(9)

    assert drawn(maker(5)) == drawn(maker(5))
    assert drawn(maker(5))[2] == maker(5).template(9)
    assert drawn(maker(5)) != drawn(maker(6))


def test_words_are_distinct() -> None:
    assert len(set(WORDS)) == len(WORDS) > 150
