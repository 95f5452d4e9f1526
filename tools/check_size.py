"""Hold the size budget: files, functions and protocols stay small enough to read in one go.

A file has at most 400 lines (kernels 450), a function 60, a protocol 5 methods.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

FILE_LINES: Final = 400
KERNEL_LINES: Final = 450
FUNCTION_LINES: Final = 60
PROTOCOL_METHODS: Final = 5

KERNEL_SUFFIXES: Final = {".cpp", ".h", ".hpp", ".cu", ".cuh"}
FOLDERS: Final = ("src", "tests", "tools", "bench", "examples")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def file_limit(path: Path) -> int:
    """Return the line budget of one file."""
    return (
        KERNEL_LINES if path.suffix in KERNEL_SUFFIXES or path.name == "triton.py" else FILE_LINES
    )


def is_protocol(node: ast.ClassDef) -> bool:
    """Tell whether a class derives directly from Protocol."""
    names = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    return any(getattr(n, "attr", getattr(n, "id", None)) == "Protocol" for n in names)


def python_violations(path: Path, source: str) -> Iterator[str]:
    """Yield a sentence per function or protocol over budget."""
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines, limit {FUNCTION_LINES}"
        elif isinstance(node, ast.ClassDef) and is_protocol(node):
            methods = sum(isinstance(item, Function) for item in node.body)
            if methods > PROTOCOL_METHODS:
                yield (
                    f"{path}:{node.lineno}: protocol {node.name} has {methods} methods, "
                    f"limit {PROTOCOL_METHODS}"
                )


def violations(root: Path) -> Iterator[str]:
    """Yield a sentence per violation under `root`."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix != ".py" and path.suffix not in KERNEL_SUFFIXES:
                continue
            source = path.read_text(encoding="utf-8")
            lines = len(source.splitlines())
            if lines > file_limit(path):
                yield f"{path}: {lines} lines, limit {file_limit(path)}"
            if path.suffix == ".py":
                yield from python_violations(path, source)


def main(root: Path) -> int:
    """Print every violation; return 1 where there is one."""
    found = list(violations(root))
    print("\n".join(found) or "size: every file, function and protocol is within budget")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
