"""Sealed checkpoints load as the plain ones that they were made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvkeep.errors import CheckpointError
from kvkeep.models import loader, make
from kvkeep.models.check import check_directory
from kvkeep.models.checkpoint import INDEX_NAME, open_checkpoint
from kvkeep.ops import Ops
from kvkeep.shield.folder import MANIFEST, Body, seal_folder
from tests.models.test_checkpoint import sharded
from tests.models.test_host import LENGTHS, flat, prompts

__all__ = ["sharded"]


def unwrap(body: Body) -> memoryview:
    return memoryview(bytearray(body.wrapped))


def sealed(plain: Path, target: Path) -> Path:
    names = [file.name for file in open_checkpoint(plain).files]
    seal_folder(plain, target, names, lambda key, _: bytes(key), "file")
    return target


@pytest.fixture
def folder(shared: Callable[[str], Path], tmp_path: Path) -> Path:
    return sealed(shared("qwen2"), tmp_path / "sealed")


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_logits_and_digest_are_the_plain_ones(
    ops: Ops, shared: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    plain = shared(family)
    folder = sealed(plain, tmp_path / "sealed")
    one, two = (loader.load(path, ops=ops, unwrap=unwrap) for path in (plain, folder))
    assert one.spec == two.spec
    ids = prompts(LENGTHS)
    assert torch.equal(flat(one, ids), flat(two, ids))


def test_shards_are_sealed_one_by_one(sharded: Path, tmp_path: Path) -> None:
    folder = sealed(sharded, tmp_path / "sealed")
    plain, opened = open_checkpoint(sharded), open_checkpoint(folder, unwrap)
    assert len(opened.files) == len(plain.files) > 1
    assert [file.name for file in opened.files] == [file.name for file in plain.files]
    assert opened.digest() == plain.digest()
    assert (folder / INDEX_NAME).is_file()
    assert not list(folder.glob("*.safetensors"))


def test_weights_stay_shut_without_a_key(folder: Path) -> None:
    assert check_directory(folder) == "qwen2"
    with pytest.raises(CheckpointError, match="is sealed; only an engine"):
        open_checkpoint(folder)


def test_what_is_not_whole_is_told_before_a_key_is_asked_for(folder: Path) -> None:
    (weights,) = folder.glob("*.sealed")
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"not whole: model.safetensors.sealed: it was cut"):
        check_directory(folder)
    with pytest.raises(CheckpointError, match=r"does not open: model.safetensors.sealed: it was"):
        open_checkpoint(folder, unwrap)
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="can't be read"):
        check_directory(folder)


def test_a_changed_byte_ends_the_load(ops: Ops, folder: Path) -> None:
    (weights,) = folder.glob("*.sealed")
    raw = bytearray(weights.read_bytes())
    raw[-20] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match="its bytes were changed"):
        loader.load(folder, ops=ops, unwrap=unwrap)


def test_a_file_that_goes_while_it_is_read_is_told(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, unwrap)
    (weights,) = folder.glob("*.sealed")
    weights.unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        checkpoint.digest()


def test_an_empty_file_is_no_checkpoint(tmp_path: Path) -> None:
    plain = make.tiny("qwen2", tmp_path / "plain")
    (plain / "model.safetensors").write_bytes(b"")
    seal_folder(plain, tmp_path / "s", ["model.safetensors"], lambda key, _: bytes(key), "file")
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        open_checkpoint(tmp_path / "s", unwrap)
