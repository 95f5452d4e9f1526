"""The benchmark page says what the result files say."""

from __future__ import annotations

from tools import render_benchmarks


def test_the_page_is_current() -> None:
    assert render_benchmarks.main(["--check"]) == 0


def test_a_changed_figure_shows() -> None:
    page = render_benchmarks.PAGE.read_text(encoding="utf-8")
    assert render_benchmarks.BLOCK.search(page), "the page shows at least one result file"
    typed = page.replace("| shown |", "| missed |", 1)
    assert typed != page
    assert render_benchmarks.render(typed) == page


def test_cells_are_short() -> None:
    assert render_benchmarks.cell(1.23456) == "1.23"
    assert render_benchmarks.cell(None) == ""
    assert render_benchmarks.cell("x") == "x"
