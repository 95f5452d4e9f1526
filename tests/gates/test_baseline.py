from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tools import check_baseline

SOURCE = "void f(float* x) { for (int i = 0; i < 64; ++i) x[i] *= 2; }\n"


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    if not shutil.which("c++") or not shutil.which("objdump"):
        pytest.skip("needs a C++ compiler and objdump")
    (tmp_path / "f.cpp").write_text(SOURCE)
    return tmp_path


def compile_to(folder: Path, name: str, *flags: str) -> None:
    subprocess.run(["c++", "-O3", *flags, "-c", folder / "f.cpp", "-o", folder / name], check=True)


def test_narrow_objects_pass_beside_wide_ones_of_their_own(compiled: Path) -> None:
    compile_to(compiled, "f.cpp.o")
    compile_to(compiled, "f_avx512.cpp.o", "-mavx512f", "-mprefer-vector-width=512")
    assert check_baseline.main(compiled) == 0


def test_a_wide_baseline_breaks(compiled: Path) -> None:
    compile_to(compiled, "f.cpp.o", "-mavx512f", "-mprefer-vector-width=512")
    assert check_baseline.main(compiled) == 1


def test_no_object_breaks(tmp_path: Path) -> None:
    assert check_baseline.main(tmp_path) == 1
