"""Hold a coverage report against `coverage-floor.toml`; floors only rise."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Covered(NamedTuple):
    """Lines and branches of some files, covered and in all."""

    hit: int
    total: int

    @property
    def percent(self) -> float:
        """Return the covered share in percent; nothing to cover counts as covered."""
        return 100.0 * self.hit / self.total if self.total else 100.0


def covered(report: Mapping[str, Any], prefix: str) -> Covered:
    """Add up the files whose path inside the package starts with `prefix`."""
    hit = total = 0
    for name, entry in report["files"].items():
        if name.partition("kvkeep/")[2].startswith(prefix):
            counts = entry["summary"]
            hit += counts["covered_lines"] + counts["covered_branches"]
            total += counts["num_statements"] + counts["num_branches"]
    return Covered(hit, total)


def violations(report: Mapping[str, Any], floors: Mapping[str, float]) -> Iterator[str]:
    """Yield a sentence per floor that is not reached or names no file."""
    for prefix, floor in floors.items():
        part = covered(report, "" if prefix == "all" else prefix)
        if not part.total:
            yield f"coverage: nothing measured under {prefix!r}"
        elif part.percent < floor:
            yield f"coverage: {prefix} {part.percent:.1f} % is below its floor of {floor} %"


def main(report_path: Path, floor_path: Path) -> int:
    """Print every violation; return 1 where there is one."""
    report = json.loads(report_path.read_text(encoding="utf-8"))
    floors = tomllib.loads(floor_path.read_text(encoding="utf-8"))["percent"]
    found = list(violations(report, floors))
    print("\n".join(found) or f"coverage: {covered(report, '').percent:.1f} %, all floors held")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path("coverage-floor.toml")))
