"""Write the tables of docs/benchmarks.md and README.md from bench/results/*.json.

A table stands between `<!-- results: FILE -->`, or `<!-- table: NAME -->`, and `<!-- end -->`. With
`--check` nothing is written and the exit code says whether the pages were current.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tools import sharing_results
from tools.sharing_results import Policy

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(
    r"(<!-- (?P<kind>results|table): (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)
NOT_MEASURED: Final = "not measured"
TOLD: Final[Mapping[str, tuple[str, str]]] = {
    "isolate": ("`isolate`", "untold"),
    "selective": ("`selective`, the default", "untold unless k others sent it, cleared"),
    "dp": ("`dp`", "untold but for odds of e^eps"),
    "pinned": ("`pinned`", "untold: the operator says what is shared"),
    "salt": ("`salt`", "told by timing to all of one salt"),
    "safekv": ("`safekv`", "told where the detector misses"),
    "share_all": ("`share_all`", "told by timing"),
    "vllm": ("vLLM, as it comes", "told by timing"),
    "vllm_salted": ("vLLM, a salt per tenant", "untold while salts are secret"),
}
"""How each policy is named, and what one tenant is told of another's prompt, by design."""


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
    isa = f" ({machine['isa']})" if "isa" in machine else ""
    params = ", ".join(f"{name} {value}" for name, value in meta["params"].items())
    lines = [
        f"`{document['name']}`, {meta['date'][:10]}, commit `{meta['commit'][:12]}`.",
        f"Machine: {machine['cpu']}{isa}, {machine['cores']} cores. {params}.",
        "",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault(tuple(row), []).append(row)
    for rows in groups.values():
        lines += [*table(rows), ""]
    return "\n".join(lines)


def policy_cells(policy: Policy) -> dict[str, str]:
    """Return a policy as a row of the README's table."""
    cost, leak = policy.cost, policy.leak
    named, told = TOLD[policy.name]
    version = cost.engine.partition(" ")[2] if cost else ""
    return {
        "policy": f"{named} ({version})" if version else named,
        "first token, median": f"{cost.ttft_ms:.0f} ms" if cost else NOT_MEASURED,
        "tokens per second": f"{cost.tokens_per_s:,.0f}" if cost else NOT_MEASURED,
        "of prompts found": f"{cost.hit_ratio:.0%}" if cost else NOT_MEASURED,
        "attack's AUC": f"{leak.auc:.2f} ± {leak.halfwidth:.2f}" if leak else NOT_MEASURED,
        "another tenant's prompt": told,
    }


def sharing_table() -> str:
    """Return the policies beside each other, and of which commits they are."""
    found = {p.name: p for p in sharing_results.read(sorted(RESULTS.glob("sharing*.json")))}
    rows = [policy_cells(found.get(name, Policy(name, None, None))) for name in TOLD]
    said = "; ".join(sharing_results.provenance([*found.values()]))
    return "\n".join([*table(rows), "", f"{said[:1].upper()}{said[1:]}.", ""])


TABLES: Final[Mapping[str, Callable[[], str]]] = {"sharing": sharing_table}


def render(page: str) -> str:
    """Return the page with every block made anew."""

    def fill(found: re.Match[str]) -> str:
        if found["kind"] == "table":
            made = TABLES[found["name"]]()
        else:
            made = block(json.loads((RESULTS / found["name"]).read_text(encoding="utf-8")))
        return f"{found[1]}\n{made}\n{found[4]}"

    return BLOCK.sub(fill, page)


def main(arguments: list[str]) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    pages = {path: path.read_text(encoding="utf-8") for path in (PAGE, README)}
    made = {path: render(page) for path, page in pages.items()}
    if given.check:
        return int(made != pages)
    for path, page in made.items():
        path.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
