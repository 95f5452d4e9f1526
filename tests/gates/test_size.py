from __future__ import annotations

from pathlib import Path

from tools import check_size


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_small_code_passes(tmp_path: Path) -> None:
    write(tmp_path, "src/a.py", "def f() -> None:\n    pass\n")
    assert check_size.main(tmp_path) == 0


def test_long_file_breaks(tmp_path: Path) -> None:
    write(tmp_path, "src/a.py", "x = 1\n" * (check_size.FILE_LINES + 1))
    assert check_size.main(tmp_path) == 1


def test_kernels_have_their_own_budget(tmp_path: Path) -> None:
    write(tmp_path, "src/a.cpp", "int x;\n" * check_size.KERNEL_LINES)
    assert check_size.main(tmp_path) == 0
    write(tmp_path, "src/a.cpp", "int x;\n" * (check_size.KERNEL_LINES + 1))
    assert check_size.main(tmp_path) == 1


def test_long_function_breaks(tmp_path: Path) -> None:
    body = "    x = 1\n" * check_size.FUNCTION_LINES
    write(tmp_path, "tests/a.py", f"async def f() -> None:\n{body}")
    (found,) = check_size.violations(tmp_path)
    assert "f has 61 lines" in found


def test_wide_protocol_breaks_and_wide_class_does_not(tmp_path: Path) -> None:
    methods = "".join(f"    def m{i}(self) -> int: ...\n" for i in range(6))
    write(tmp_path, "src/a.py", f"class C:\n{methods}")
    assert check_size.main(tmp_path) == 0
    write(tmp_path, "src/a.py", f"class C(Protocol[T]):\n{methods}")
    (found,) = check_size.violations(tmp_path)
    assert "protocol C has 6 methods" in found
