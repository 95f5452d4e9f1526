"""What the command line prints: tables and a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

OUT = Console(highlight=False, soft_wrap=True)
"""Results."""
NOTES = Console(stderr=True, highlight=False, soft_wrap=True)
"""Everything that is not a result."""


def human_bytes(count: float) -> str:
    """Return a byte count with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def make_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> Table:
    """Return a table; columns that start with a number align to the right."""
    shown = [[str(cell) for cell in row] for row in rows]
    table = Table(title=title or None, title_justify="left")
    for index, name in enumerate(columns):
        numeric = bool(shown) and all(row[index][:1].isdigit() for row in shown)
        table.add_column(name, justify="right" if numeric else "left")
    for row in shown:
        table.add_row(*row)
    return table


def print_wide(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = ""
) -> None:
    """Print a table whole: one that is wider than the terminal in parts, the first column in each.

    For tables whose cells are figures, which a narrow column would cut.
    """
    shown = [[str(cell) for cell in row] for row in rows]
    widths = [
        max(len(row[index]) for row in [list(columns), *shown]) for index in range(len(columns))
    ]
    for part in _parts(widths, console.width):
        picked = [[row[index] for index in part] for row in shown]
        console.print(make_table([columns[index] for index in part], picked, title))


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Return which columns stand beside each other, each part led by the first column."""
    between = 3  # a space on both sides and a line
    parts = [[0]]
    left = room - 1 - between - widths[0]
    for index, width in enumerate(widths[1:], start=1):
        if width + between > left and len(parts[-1]) > 1:
            parts.append([0])
            left = room - 1 - between - widths[0]
        parts[-1].append(index)
        left -= width + between
    return parts


@contextmanager
def loading_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for (done, total) bytes; silent where stderr is no terminal."""
    with _bar(what, DownloadColumn(binary_units=True)) as report:
        yield report


@contextmanager
def counting_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for (done, total) of anything; silent where stderr is no terminal."""
    with _bar(what, MofNCompleteColumn()) as report:
        yield report


@contextmanager
def _bar(what: str, count: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    with Progress(
        TextColumn(what),
        BarColumn(),
        count,
        TimeRemainingColumn(),
        console=NOTES,
        transient=True,
        disable=not NOTES.is_terminal,
    ) as progress:
        task = progress.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield report
