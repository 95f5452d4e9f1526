"""Hold that the baseline objects of the extension hold no AVX-512 (and no AVX2) instruction.

Each instruction set is compiled into objects of its own and chosen at run time; a wheel runs on
any x86-64 machine only while the objects without a suffix stay free of wide registers.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

WIDE_REGISTER: Final = re.compile(r"%[yz]mm\d|%k[1-7]\b")
SUFFIXES: Final = ("_avx2.cpp.o", "_avx512.cpp.o")


def baseline_objects(build: Path) -> list[Path]:
    """Return the compiled objects that every machine may run."""
    return sorted(p for p in build.rglob("*.cpp.o") if not p.name.endswith(SUFFIXES))


def wide_instructions(disassembly: str) -> list[str]:
    """Return the lines that touch a ymm, zmm or mask register."""
    return [line.strip() for line in disassembly.splitlines() if WIDE_REGISTER.search(line)]


def main(build: Path) -> int:
    """Disassemble every baseline object; return 1 where one is wide or none is found."""
    objects = baseline_objects(build)
    if not objects:
        print(f"baseline: no object under {build}; build the wheel first")
        return 1
    bad = 0
    for path in objects:
        shown = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
        lines = wide_instructions(shown.stdout)
        if lines:
            bad += 1
            print(f"{path}: {len(lines)} wide instructions, first: {lines[0]}")
    if not bad:
        print(f"baseline: {len(objects)} objects free of AVX2 and AVX-512")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
