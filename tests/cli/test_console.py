"""Tables of figures are whole in any terminal."""

from __future__ import annotations

import io

from rich.console import Console

from kvkeep.cli.console import print_wide

COLUMNS = ("tree", "gain_over_request_outer", "gain_by_another_rule", "over_two_level", "ms")
ROWS = (("1,2,64", "1.04", "1.033", "1.024", "2.093"), ("1,256", "1.026", "0.9038", "1.129", "7.4"))


def printed(width: int) -> str:
    """Return what a terminal of `width` characters shows."""
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    print_wide(console, COLUMNS, ROWS, title="trees")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_wide_terminal_shows_one_table() -> None:
    """Nothing is repeated where there is room."""
    assert printed(200).count("1,2,64") == 1


def test_a_narrow_terminal_shows_every_cell_whole() -> None:
    """Parts carry the first column, and no line is longer than the terminal."""
    text = printed(50)
    assert text.count("1,2,64") > 1
    assert "…" not in text
    assert all(cell in text for cell in (*COLUMNS, *ROWS[0], *ROWS[1]))
    assert max(map(len, text.splitlines())) <= 50


def test_a_column_wider_than_the_terminal_still_gets_a_part() -> None:
    """No part is without a second column, whatever the width."""
    text = printed(20)
    assert text.count("trees") == len(COLUMNS) - 1
