"""Hold that only `kvkeep.ops` imports the compiled extension, which import-linter cannot see."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

EXTENSION: Final = "_native"
HOME: Final = "ops"


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names)


def violations(package: Path) -> Iterator[str]:
    """Yield a sentence per import of the extension outside its home."""
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] == HOME:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, name in imported_names(tree):
            if EXTENSION in name.split("."):
                yield f"{path}:{line}: imports {name}; only kvkeep.{HOME} may touch the extension"


def main(package: Path) -> int:
    """Print every violation; return 1 where there is one."""
    found = list(violations(package))
    print("\n".join(found) or f"extension: imported by kvkeep.{HOME} alone")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "src/kvkeep")))
