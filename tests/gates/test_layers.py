"""Plant a violation of each contract in a copy of the package and see import-linter break."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_extension_imports

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layers")
    shutil.copytree(
        ROOT / "src",
        root / "src",
        ignore=shutil.ignore_patterns("*.so", "csrc", "__pycache__", "demo"),
    )
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


# An editable install finds the checkout before any path; without its finder the copy is read.
LINT = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
sys.path.insert(0, "src")
from importlinter.cli import lint_imports
sys.exit(lint_imports(cache_dir=None, no_cache=True))
"""


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=root,
        env=os.environ | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tree_as_it_is_keeps_every_contract(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("ops/layout.py", "import kvkeep.engine.api", "imports point down only"),
        ("quant/__init__.py", "import kvkeep.sharing", "imports point down only"),
        (
            "eviction/__init__.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kvkeep.cache",
            "imports point down only",
        ),
        ("sharing/__init__.py", "import torch", "never import torch"),
        ("types.py", "def late() -> None:\n    import torch", "never import torch"),
        ("models/__init__.py", "import triton", "only ops imports triton"),
        ("cache/__init__.py", "import kvkeep.shield", "cache receives the techniques"),
        ("audit/__init__.py", "import kvkeep.cache", "audit speaks HTTP alone"),
        ("server/__init__.py", "import kvkeep.engine.build", "the engine's protocol alone"),
        ("surprise.py", "", "imports point down only"),
    ],
)
def test_a_planted_violation_breaks(copy: Path, module: str, line: str, contract: str) -> None:
    path = copy / "src/kvkeep" / module
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n")
    try:
        done = lint(copy)
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
    assert done.returncode == 1
    broken = [row for row in done.stdout.splitlines() if row.endswith("BROKEN")]
    assert len(broken) == 1, done.stdout
    assert contract in broken[0]


def test_only_ops_touches_the_extension(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "cpu.py").write_text("from kvkeep.ops import _native\n")
    assert check_extension_imports.main(tmp_path) == 0
    (tmp_path / "cache.py").write_text("def f():\n    from kvkeep.ops import _native\n")
    assert check_extension_imports.main(tmp_path) == 1
