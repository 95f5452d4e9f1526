from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

import pytest
import re2
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.sharing.detector import normalise as module
from kvkeep.sharing.detector.normalise import LOOKALIKES, View, normalise, views
from tests.sharing.detector.corpus import texts

HARD = st.text(
    st.characters() | st.sampled_from("ﾀﾞｱ４１０a\u0301\u200b\u00adﬁАаⅣ㌔٤-—　 \ud800"), max_size=60
)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("plain", "plain"),
        ("４１１１　ＡＢ", "4111 AB"),
        ("a\u200bb\u00adc\ufeff", "abc"),
        ("٤٢ ४२", "42 42"),
        ("1–2—3−4", "1-2-3-4"),
        ("ﾔﾏﾀﾞ", "ヤマダ"),
        ("e\u0301", "é"),
        ("e\u200b\u0301x", "éx"),
        ("ﬁn № Ⅳ", "fin No IV"),
        ("a\ud800b", "a\ufffdb"),
        ("電話，（０３）", "電話,(03)"),
    ],
)
def test_text_becomes_plain(text: str, plain: str) -> None:
    assert normalise(text).text == plain


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("mail jоhn@аcme.iо now", "john@acme.io"),
        ("АKIА2345", "AKIA2345"),
        ("card 4lll-llll-OOOO-1111", "4111-1111-0000-1111"),
        ("4 1 1 1 1 1 1 1 now", "41111111"),
        ("j o h n @ a c m e . i o", "john@acme.io"),
        ("4.1.1.1-1/1*1_1", "41111111"),
        ("４ １ １ １ １ １ １ １", "41111111"),
        ("№ x\u200b 4 1 1 1 1 1 1 1 1", "411111111"),
        ("It is 4 1 1 1 1 1 1 1.", "41111111"),
        ('{"card": "4 1 1 1 1 1 1 1"}', "41111111"),
        ("card=4 1 1 1 1 1 1 1; so", "41111111"),
        ("(4 1 1 1 1 1 1 1)", "41111111"),
        ("geboren im Мärz", "März"),
        ("Mrs О'Neill", "O'Neill"),
        ("京А·48K29", "京A·48K29"),
    ],
)
def test_what_is_hidden_is_in_one_of_the_views(text: str, hidden: str) -> None:
    found = [view for view in views(text) if hidden in view.text]
    assert found
    start, end = found[0].original(*_place(found[0], hidden))
    assert hidden in views(text[start:end])[-1].text


def _place(view: View, word: str) -> tuple[int, int]:
    start = view.text.index(word)
    return start, start + len(word)


@pytest.mark.parametrize(
    "text", ["Сервер читає налаштування", "Ordinary words of a sentence.", "サーバーの設定", ""]
)
def test_ordinary_text_has_one_view(text: str) -> None:
    assert len(views(text)) == 1


@given(HARD)
def test_offsets_point_back_into_the_original(text: str) -> None:
    for view in views(text):
        assert view.starts is None or len(view.starts) == len(view.text) + 1
        for i in range(len(view.text)):
            start, end = view.original(i, i + 1)
            assert 0 <= start < end <= len(text)
        assert view.original(len(view.text), len(view.text)) == (len(text), len(text))


@given(st.text(st.characters(codec="utf-8", min_codepoint=0x20, max_codepoint=0x2FFF)))
def test_each_letter_alone_is_what_it_is_in_the_text(text: str) -> None:
    plain = normalise(text).text
    assert unicodedata.is_normalized("NFKC", plain) or any(map(unicodedata.combining, text))


def letter_by_letter(text: str) -> tuple[str, list[int]]:
    """Return a text normalised without any short cut, and where each letter came from."""
    whole = re.sub("[\ud800-\udfff]", "\ufffd", text)
    for wide, plain in zip("，（）：；！？\u3000", ",():;!? "):
        whole = whole.replace(wide, plain)
    follows, table = module._LETTERS.follows, module._LETTERS.plain
    begins = [i for i, c in enumerate(whole) if i == 0 or ord(c) not in follows]
    letters, starts = "", []
    for begin, end in pairwise([*begins, len(whole)]):
        visible = whole[begin:end].translate(table)
        plain = unicodedata.normalize("NFKC", visible).translate(table)
        letters += plain
        starts += [begin] * len(plain)
    return letters, [*starts, len(whole)]


def token_by_token(text: str) -> str:
    """Return a text folded by looking at every token."""
    letters = list(text)
    for token in re2.finditer(r"[^\s\pZ]+", text):
        word = token.group()
        if any((c.isascii() and c.isalnum()) or c == "@" for c in word):
            letters[token.start() : token.end()] = [LOOKALIKES.get(c, c) for c in word]
    folded = "".join(letters)
    for run in re2.finditer(module._DIGIT_LIKE, folded):
        plain = [{"|": "1", "l": "1", "I": "1"}.get(c, "0") for c in run.group()]
        kept = [c if c in "0123456789 -" else p for c, p in zip(run.group(), plain)]
        letters[run.start() : run.end()] = kept
    return "".join(letters)


def test_short_cuts_change_nothing() -> None:
    folded = mapped = 0
    for text in texts(600, seed=5, hard=True):
        view = normalise(text)
        letters, starts = letter_by_letter(text)
        assert view.text == letters
        assert list(view.starts or range(len(text) + 1)) == starts
        mapped += view.starts is not None
        fold = module._fold(view)
        assert (view if fold is None else fold).text == token_by_token(view.text)
        folded += fold is not None
    assert mapped > 100
    assert folded > 50


@given(HARD)
def test_short_cuts_change_nothing_of_hard_text(text: str) -> None:
    view = normalise(text)
    letters, starts = letter_by_letter(text)
    assert (view.text, list(view.starts or range(len(text) + 1))) == (letters, starts)


def test_a_vowel_sign_that_joins_its_letter_keeps_the_offsets() -> None:
    view = normalise("\u09c7\u09be 12")
    assert view.text == "\u09cb 12"
    assert view.original(2, 4) == (3, 5)


def test_a_change_that_is_not_tried_would_change_nothing() -> None:
    several = 0
    for text in texts(600, seed=6, hard=True):
        tried = [normalise(text)]
        if module._UNUSUAL.search(tried[0].text.encode()) is not None:
            for change in (module._fold, module._join):
                view = change(tried[-1])
                tried += [] if view is None else [view]
        assert views(text) == tried
        several += len(tried) > 1
    assert several > 50
