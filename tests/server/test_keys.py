from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.server.keys import key_digest, new_key, parse_key, same_secret


def test_a_key_has_its_form_and_hides_in_reprs() -> None:
    key = new_key()
    form = r"kvk_([0-9A-Za-z]{12})_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}"
    match = re.fullmatch(form, key.text)
    assert match is not None
    assert match[1] == key.id
    assert parse_key(key.text) == key
    assert key.text not in repr(key)
    assert key.text not in key_digest(key.text)
    assert new_key().text != key.text


@given(st.integers(0, 68), st.sampled_from("0aZ_-\n "))
def test_one_wrong_character_makes_a_key_invalid(at: int, other: str) -> None:
    text = new_key().text
    broken = text[:at] + other + text[at + 1 :]
    assert (parse_key(broken) is not None) == (broken == text)


def test_keys_with_anything_around_them_are_invalid() -> None:
    text = new_key().text
    for other in ("", text + "\n", " " + text, text[:-1], text + "0", text.upper()):
        assert parse_key(other) is None


def test_secrets_of_any_length_compare() -> None:
    assert same_secret("abc", "abc")
    assert not same_secret("abc", "abcd")
    assert not same_secret("", "é")
