from __future__ import annotations

import pytest

from kvkeep.sharing.detector.fillers import filled, person, somebody

SOMEBODY = ["Orla Whitfield", "Orla", "欧阳晓", "Остап Лозинський", "Le Goff", "La Rosa", "Minh Le"]
NOBODY = ["Präsident", "Dear Customer", "John Doe", "张三", "Sir", "der Kunde", "Madame", "the"]


@pytest.mark.parametrize("value", [*SOMEBODY, "Professor Lindqvist", "der Allianz"])
def test_names_are_somebody(value: str) -> None:
    assert person(value)


@pytest.mark.parametrize("value", NOBODY)
def test_offices_and_samples_are_nobody(value: str) -> None:
    assert not person(value)


@pytest.mark.parametrize("value", ["Orla", "Signor Rossi", "Herr Präsident Lind", "customer Maria"])
def test_a_name_beside_an_office_is_somebody(value: str) -> None:
    assert somebody(value)


@pytest.mark.parametrize("value", ["Signor", "señorías", "先生", "der Präsident", "John Doe", " "])
def test_offices_and_samples_alone_are_not_somebody(value: str) -> None:
    assert not somebody(value)


@pytest.mark.parametrize(("value", "holds"), [("mumps", True), ("string", False), ("None", False)])
def test_a_type_fills_no_field(value: str, holds: bool) -> None:
    assert filled(value) is holds
