"""Every sentence of the threat model names tests that exist, files that exist, all the policies."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from kvkeep.sharing.guarantees import GUARANTEES
from kvkeep.sharing.scans import ScanLimits
from kvkeep.sharing.votes import PromotionLimits

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "threat-model.md"
CODE: Final = ROOT / "src" / "kvkeep"
TEST: Final = re.compile(r"`(?P<file>[\w/]*test_\w+\.py)(?:::(?P<name>\w+))?`")
BARE: Final = re.compile(r"`(test_\w+)`")
SOURCE: Final = re.compile(r"`([\w/]+(?:\.py|/))`")
BUDGET: Final = re.compile(
    r"is (?P<tokens>[\d,]+) tokens, about (?P<s>[\d.]+) s of a core at (?P<ms>[\d.]+) ms for 512 "
    r"[^:]*: that is (?P<tenants>\d+) tenants"
)
"""What the detector can read within an epoch."""
HELD_BY: Final = ("held by", "test")
"""Heads of the columns in which a row says what fails if it is false."""


@cache
def names_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in tree.body if isinstance(node, kinds))


def rows(page: str, heads: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield the cells of every row of the tables whose last column has such a head."""
    inside = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|-"):
            yield cells
        inside = inside or (line.startswith("|") and cells[-1] in heads)


def problems(page: str) -> list[str]:
    """Return a sentence for each name that does not stand up."""
    found = []
    for test in TEST.finditer(page):
        file = test["file"]
        path = ROOT / (file if file.startswith("tests/") else f"tests/sharing/{file}")
        if not path.is_file():
            found.append(f"{file}: no such file")
        elif test["name"] is None:
            found.append(f"{file}: names no test")
        elif test["name"] not in names_of(path):
            found.append(f"{file}: no test {test['name']}")
    found += [f"{bare[1]}: say FILE::TEST" for bare in BARE.finditer(page)]
    for cells in rows(page, HELD_BY):
        if not TEST.search(cells[-1]):
            found.append(f"{cells[0]}: no test holds it")
        for source in SOURCE.findall("|".join(cells[:-1])):
            if not (CODE / source).exists():
                found.append(f"{source}: no such file")
    return found


def test_every_sentence_names_tests_and_files_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert problems(page) == []
    assert len(list(rows(page, HELD_BY))) >= 20


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("::test_nothing_crosses_scopes", "::test_nothing_crosses", "no test test_nothing_crosses"),
        ("`policies/test_dp.py::", "`policies/test_pd.py::", "policies/test_pd.py: no such file"),
        ("`server/logs.py`", "`server/log.py`", "server/log.py: no such file"),
        (
            "`test_renewal.py::test_what_was_offered_before_the_change_is_read_by_nobody`",
            "`test_renewal.py`",
            "test_renewal.py: names no test",
        ),
        (
            "`test_promotion.py::test_planted_votes_cannot_fill_the_public_pool`",
            "`test_planted_votes_cannot_fill_the_public_pool`",
            "say FILE::TEST",
        ),
        (
            "`test_promotion.py::test_planted_votes_cannot_fill_the_public_pool`",
            "that is so",
            "planted votes cannot fill the public pool: no test holds it",
        ),
    ],
)
def test_a_wrong_name_is_seen(right: str, wrong: str, problem: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert right in page
    assert any(problem in one for one in problems(page.replace(right, wrong)))


def test_how_many_tenants_the_detector_reads_for_follows_from_what_was_recorded() -> None:
    (path,) = (ROOT / "bench" / "results").glob("detect-*.json")
    ms = json.loads(path.read_text(encoding="utf-8"))["summary"]["detect_ms_per_512_chars_all"]
    told = BUDGET.search(" ".join(PAGE.read_text(encoding="utf-8").split()))
    assert told is not None
    tokens = ScanLimits().epoch_bytes // 4
    budget_s = 4 * tokens / 512 * ms / 1e3
    assert told["tokens"] == f"{tokens:,}"
    assert float(told["ms"]) == pytest.approx(ms, rel=0.02)
    assert float(told["s"]) == pytest.approx(budget_s, rel=0.02)
    assert int(told["tenants"]) == pytest.approx(PromotionLimits().epoch_s / budget_s, rel=0.05)


def test_every_policy_is_held_against_the_standard() -> None:
    told = {cells[0].strip("`"): cells[1:] for cells in rows(PAGE.read_text("utf-8"), ("C5.6.2",))}
    assert {*told} == {*GUARANTEES}
    assert all(len(cells) == 3 and all(cells) for cells in told.values())
    for name, guarantee in GUARANTEES.items():
        unmet = any(cell.startswith("not met") for cell in told[name][1:])
        assert unmet == (not guarantee.safe), f"{name}: the page and `serve` disagree"
