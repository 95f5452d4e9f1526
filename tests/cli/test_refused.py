"""A model that can't be served is refused from its files: no engine, no torch, no transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from safetensors.numpy import load_file, save_file

from kvkeep.models.checkpoint import SINGLE_NAME
from kvkeep.models.make import tiny

COMMANDS: Final = {
    "serve": ["serve", "--no-auth", "--port", "0", "--admin-port", "0"],
    "generate": ["generate", "Once"],
    "chat": ["chat"],
}
LATE: Final = ("torch", "transformers", "multiprocessing.popen_spawn_posix")
"""What is imported only for a tokenizer or an engine, the last of them by its start."""

PROGRAM: Final = f"""
import sys
from kvkeep.cli import run
code = run(sys.argv[1:])
print(*(name for name in {LATE!r} if name in sys.modules))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("model") / "tiny")


def change_config(path: Path, name: str, value: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {name: value}))


def unknown_architecture(path: Path) -> None:
    change_config(path, "architectures", ["GPT2LMHeadModel"])


def no_size(path: Path) -> None:
    change_config(path, "hidden_size", None)


def no_tensor(path: Path) -> None:
    tensors = load_file(path / SINGLE_NAME)
    del tensors["model.norm.weight"]
    save_file(tensors, path / SINGLE_NAME)


def cut_off(path: Path) -> None:
    with (path / SINGLE_NAME).open("r+b") as file:
        file.truncate(file.seek(-9, 2))


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


REFUSED: Final[dict[str, Callable[[Path], None]]] = {
    "GPT2LMHeadModel": unknown_architecture,
    "`hidden_size`": no_size,
    "model.norm.weight": no_tensor,
    "truncated": cut_off,
    "tokenizer.json": no_tokenizer,
}


def refused(command: str, model: Path, said: str) -> None:
    """Run a command on a broken model and see it end early with one sentence."""
    arguments = [*COMMANDS[command], "--model", str(model)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("kvkeep: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not done.stdout.split(), "imported before the refusal"


@pytest.mark.parametrize("said", REFUSED)
def test_serve_refuses_before_it_starts_an_engine(tmp_path: Path, whole: Path, said: str) -> None:
    model = shutil.copytree(whole, tmp_path / "broken")
    REFUSED[said](model)
    refused("serve", model, said)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_so_do_the_commands_without_a_server(tmp_path: Path, whole: Path, command: str) -> None:
    model = shutil.copytree(whole, tmp_path / "broken")
    no_tensor(model)
    refused(command, model, "model.norm.weight")
