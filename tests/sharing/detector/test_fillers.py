from __future__ import annotations

import pytest

from kvkeep.sharing.detector.fillers import filled, own_secret, person, real_place, somebody

SOMEBODY = ["Orla Whitfield", "Orla", "欧阳晓", "Остап Лозинський", "Le Goff", "La Rosa", "Minh Le"]
NOBODY = [
    "Präsident",
    "Landrat",
    "事情を話す",
    "Dear Customer",
    "John Doe",
    "张三",
    "Sir",
    "der Kunde",
    "Madame",
    "the",
]


@pytest.mark.parametrize("value", [*SOMEBODY, "Professor Lindqvist", "der Allianz"])
def test_names_are_somebody(value: str) -> None:
    assert person(value)


@pytest.mark.parametrize("value", NOBODY)
def test_offices_and_samples_are_nobody(value: str) -> None:
    assert not person(value)


@pytest.mark.parametrize("value", ["Orla", "Signor Rossi", "Herr Präsident Lind", "customer Maria"])
def test_a_name_beside_an_office_is_somebody(value: str) -> None:
    assert somebody(value)


@pytest.mark.parametrize(
    "value", ["Signor", "señorías", "先生", "der Präsident", "Dr, Prof and", "John Doe", " "]
)
def test_offices_and_samples_alone_are_not_somebody(value: str) -> None:
    assert not somebody(value)


@pytest.mark.parametrize(
    ("value", "holds"),
    [("mumps", True), ("string", False), ("None", False), ("row.get", False), ("Row Foods", True)],
)
def test_a_type_fills_no_field(value: str, holds: bool) -> None:
    assert filled(value) is holds


@pytest.mark.parametrize(
    ("value", "real"),
    [
        ("Via Roma 12, 00184 Roma", True),
        ("(Via Roma 1, 00100 Roma)", False),
        ("11 rue de la Paix", True),
        ("Jean, 1 rue de la Paix", False),
        ("99999 Ville", False),
        ("19999 Ville", True),
        ("вул. Прикладна, 1", False),
        ("calle se cerró en 2008", False),
        ("calle del Olmo 2008", True),
        ("Вулицю перекрили 2011", False),
    ],
)
def test_a_forms_street_is_no_place(value: str, real: bool) -> None:
    assert real_place(value) is real


@pytest.mark.parametrize(("value", "own"), [("s3cr", True), ("password", False), ("PASS", False)])
def test_a_sample_of_an_address_is_no_secret(value: str, own: bool) -> None:
    assert own_secret(value) is own
