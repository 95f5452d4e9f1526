"""The cost model: fitted, written, read back, and refused where a file is not one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest

from kvkeep.attention.cost import (
    DEVICE_SEED,
    MIN_ROWS,
    SEED,
    CostModel,
    Sample,
    believable,
    fit,
    load,
    merge_cost,
    padded,
    save,
    scaled,
)
from kvkeep.errors import ConfigError
from kvkeep.types import Layout

PLANTED = CostModel(c0=450.0, a_mem=17.0, a_row=2.25, a_merge=SEED.a_merge)


def samples(model: CostModel) -> list[Sample]:
    """Return items that take exactly what the model says."""
    shapes = [(1, 64, False), (1, 1024, True), (8, 1024, True), (16, 512, False), (64, 2048, True)]
    return [
        Sample(
            rows,
            tokens,
            fresh,
            model.c0 + tokens * (model.a_mem * fresh + model.a_row * max(rows, MIN_ROWS)),
        )
        for rows, tokens, fresh in shapes
    ]


def test_fit_finds_planted_coefficients() -> None:
    found = fit(samples(PLANTED))
    assert asdict(found) == pytest.approx(asdict(PLANTED), rel=1e-9)


def test_fit_weighs_errors_by_their_share() -> None:
    """A long item that is off by a twentieth does not drown the short ones."""
    items = samples(PLANTED)
    items[-1] = items[-1]._replace(ns=items[-1].ns * 1.05)
    found = fit(items)
    for item in items[:-1]:
        predicted = found.c0 + item.tokens * (
            found.a_mem * item.fresh + found.a_row * padded(item.rows)
        )
        assert predicted == pytest.approx(item.ns, rel=0.06)


def test_fit_gives_no_negative_cost() -> None:
    """Items from memory that were measured faster than those from a cache."""
    found = fit(samples(CostModel(c0=450.0, a_mem=-3.0, a_row=2.25)))
    assert found.a_mem == 0
    assert (found.c0, found.a_row) == pytest.approx((450.0, 2.25))


@pytest.mark.parametrize(("rows", "computed"), [(1, 4), (3, 4), (4, 4), (5, 5), (64, 64)])
def test_few_rows_take_as_long_as_four(rows: int, computed: int) -> None:
    assert padded(rows) == computed
    assert CostModel(3.0, 5.0, 2.0).ns(rows, 100) == 3 + 100 * (5 + 2 * computed)


def test_merging_costs_by_the_row() -> None:
    model = CostModel(3.0, 5.0, 2.0, 40.0)
    assert model.ns(1, 100, merges=True) - model.ns(1, 100) == 40
    assert model.ns(7, 100, merges=True) - model.ns(7, 100) == 280


def test_merging_that_was_measured_well_is_believed() -> None:
    assert merge_cost(25.0, 10.0) == 25.0
    assert merge_cost(SEED.a_merge / 10, 0.0) == SEED.a_merge / 10


@pytest.mark.parametrize(
    ("ns", "error"), [(-3.0, 0.0), (3.9, 0.1), (401.0, 1.0), (41_000.0, 10.0), (30.0, 15.1)]
)
def test_merging_is_not_believed_where_it_is_no_cost_or_all_noise(ns: float, error: float) -> None:
    assert merge_cost(ns, error) == SEED.a_merge


def test_merging_on_a_device_is_held_against_its_own_seed() -> None:
    assert merge_cost(2_000.0, 10.0, 300.0) == 2_000.0
    assert merge_cost(3_001.0, 10.0, 300.0) == 300.0
    assert merge_cost(29.0, 1.0, 300.0) == 300.0


def test_a_seed_in_another_unit_decides_alike() -> None:
    other = scaled(DEVICE_SEED, 3.5)
    assert other.a_mem == 3.5
    for rows, tokens in ((1, 64), (64, 4096), (512, 256)):
        ratio = other.ns(rows, tokens, merges=True) / DEVICE_SEED.ns(rows, tokens, merges=True)
        assert ratio == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("a_mem", "a_row", "believed"),
    [
        (30.0, 0.15, True),  # 200 rows cost as much as reading, as the seed's do
        (30.0, 1.5, True),
        (30.0, 1.6, False),
        (30.0, 0.015, True),
        (30.0, 0.014, False),
        (0.0, 0.15, False),
        (30.0, 0.0, False),
    ],
)
def test_a_devices_costs_are_believed_within_bounds(
    a_mem: float, a_row: float, *, believed: bool
) -> None:
    assert believable(CostModel(2_000.0, a_mem, a_row), DEVICE_SEED) is believed


MODELS = {Layout.BF16: CostModel(1.5, 0.1 + 0.2, 3.0e-7, 0.0), Layout.K2V2: PLANTED}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    save(path, MODELS)
    assert load(path, [Layout.BF16]) == (MODELS[Layout.BF16],)
    both = [Layout.K2V2, Layout.BF16]
    assert load(path, both) == tuple(MODELS[layout] for layout in both)


def test_a_file_without_a_layout_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "costs.json", MODELS)
    with pytest.raises(ConfigError, match="no costs of k4v2 pages"):
        load(tmp_path / "costs.json", [Layout.BF16, Layout.K4V2])


GOOD = asdict(PLANTED)


@pytest.mark.parametrize("missing", list(GOOD))
def test_a_layout_without_a_coefficient_is_refused(tmp_path: Path, missing: str) -> None:
    left = {k: v for k, v in GOOD.items() if k != missing}
    refuse(tmp_path, msgspec.json.encode({"bf16": left}))


@pytest.mark.parametrize("name", list(GOOD))
@pytest.mark.parametrize("value", ["-1.0", "NaN", "Infinity", "-Infinity", '"much"', "null", "[1]"])
def test_a_coefficient_that_is_no_cost_is_refused(tmp_path: Path, name: str, value: str) -> None:
    text = ", ".join(f'"{k}": {value if k == name else v}' for k, v in GOOD.items())
    refuse(tmp_path, f'{{"bf16": {{{text}}}}}'.encode())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1, 2, 3, 4]",
        b"12",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"bf16": 3}',
        msgspec.json.encode(GOOD),
        msgspec.json.encode({"bf16": {**GOOD, "a_page": 1.0}}),
    ],
)
def test_a_file_that_is_no_cost_model_is_refused(tmp_path: Path, raw: bytes) -> None:
    refuse(tmp_path, raw)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"attention_cost_model: .*nowhere\.json"):
        load(tmp_path / "nowhere.json", [Layout.BF16])


def refuse(folder: Path, raw: bytes) -> None:
    path = folder / "costs.json"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"attention_cost_model: .*costs\.json"):
        load(path, [Layout.BF16])
