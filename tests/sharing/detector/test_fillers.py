from __future__ import annotations

import pytest

from kvkeep.sharing.detector.fillers import filled, person


@pytest.mark.parametrize("value", ["Orla Whitfield", "Orla", "欧阳晓", "Остап Лозинський"])
def test_names_are_somebody(value: str) -> None:
    assert person(value)


@pytest.mark.parametrize("value", ["Präsident", "Dear Customer", "John Doe", "张三", "Sir"])
def test_offices_and_samples_are_nobody(value: str) -> None:
    assert not person(value)


@pytest.mark.parametrize(("value", "holds"), [("mumps", True), ("string", False), ("None", False)])
def test_a_type_fills_no_field(value: str, holds: bool) -> None:
    assert filled(value) is holds
