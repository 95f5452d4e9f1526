"""Write the tables of docs/benchmarks.md from bench/results/*.json.

Each table stands between `<!-- results: FILE -->` and `<!-- end -->`; with `--check` nothing is
written and the exit code says whether the page was current.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- results: (?P<file>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def cell(value: object) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of rows with the same columns."""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(cell(row.get(c)) for c in columns)} |" for row in rows]


def block(document: dict[str, Any]) -> str:
    """Return a result file's tables with where and how they came about."""
    meta = document["meta"]
    machine = meta["machine"]
    params = ", ".join(f"{name} {value}" for name, value in meta["params"].items())
    lines = [
        f"`{document['name']}`, {meta['date'][:10]}, commit `{meta['commit'][:12]}`.",
        f"Machine: {machine['cpu']}, {machine['cores']} cores. {params}.",
        "",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault(tuple(row), []).append(row)
    for rows in groups.values():
        lines += [*table(rows), ""]
    return "\n".join(lines)


def render(page: str) -> str:
    """Return the page with every block made anew."""

    def fill(found: re.Match[str]) -> str:
        document = json.loads((RESULTS / found["file"]).read_text(encoding="utf-8"))
        return f"{found[1]}\n{block(document)}\n{found[3]}"

    return BLOCK.sub(fill, page)


def main(arguments: list[str]) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    made = render(page)
    if given.check:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
