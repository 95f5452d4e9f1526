from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kvkeep.errors import CheckpointError, ModelError, ModelNotFound, UnsupportedModel
from kvkeep.models.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint
from kvkeep.models.make import tiny


def header_of(file: Path) -> tuple[dict[str, object], bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file: Path, header: object, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def test_a_good_directory_opens(broken: Path) -> None:
    checkpoint = open_checkpoint(broken)
    assert checkpoint.config["model_type"] == "qwen2"
    assert checkpoint.files == (broken / SINGLE_NAME,)
    assert checkpoint.tensors["model.norm.weight"].shape == (96,)
    assert len(checkpoint.generation["eos_token_id"]) == 2


def test_wrong_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="is not a directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "", "\xff\xfe", "[" * 100_000])
def test_bad_json_is_one_sentence(broken: Path, text: str) -> None:
    (broken / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json is not"):
        open_checkpoint(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_safetensors(broken: Path, keep: int) -> None:
    file = broken / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(broken)


@pytest.mark.parametrize(
    "header",
    [
        b"nonsense",
        [1],
        {"a": 1},
        {"a": {"dtype": "F32"}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}},
    ],
    ids=["text", "list", "number", "fields", "size", "shape"],
)
def test_malformed_headers(broken: Path, header: object) -> None:
    write_header(broken / SINGLE_NAME, header, b"\0" * 4)
    with pytest.raises(CheckpointError, match="not safetensors"):
        open_checkpoint(broken)


def test_quantised_tensors_are_refused(broken: Path) -> None:
    entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
    write_header(broken / SINGLE_NAME, {"w": entry}, b"\0" * 4)
    with pytest.raises(UnsupportedModel, match="dtype F8_E4M3"):
        open_checkpoint(broken)


def test_only_pickled_weights_are_refused(broken: Path) -> None:
    (broken / SINGLE_NAME).rename(broken / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin; only safetensors"):
        open_checkpoint(broken)


def test_no_weights_at_all(broken: Path) -> None:
    (broken / SINGLE_NAME).unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        open_checkpoint(broken)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny("qwen2", tmp_path / "sharded", shard_bytes=200_000)


def test_shards_hold_the_same_tensors(sharded: Path, broken: Path) -> None:
    several = open_checkpoint(sharded)
    assert len(several.files) > 2
    one = open_checkpoint(broken)
    assert {n: t.shape for n, t in several.tensors.items()} == {
        n: t.shape for n, t in one.tensors.items()
    }


def test_index_naming_a_missing_shard(sharded: Path) -> None:
    name = open_checkpoint(sharded).files[1].name
    (sharded / name).unlink()
    with pytest.raises(CheckpointError, match=f"names {name}, which is missing"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.norm.weight": "../evil.safetensors"}, "not a shard beside it"),
        ({"model.norm.weight": "pytorch_model.bin"}, "not a shard beside it"),
        ({"ghost.weight": "model-00001-of-00004.safetensors"}, "it is not"),
        ({"model.norm.weight": 3}, "has no `weight_map`"),
    ],
    ids=["outside", "pickle", "ghost", "type"],
)
def test_contradictory_index(sharded: Path, change: dict[str, object], says: str) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    total = len(open_checkpoint(sharded).files)
    for name, file in change.items():
        shard = f"model-00001-of-{total:05}.safetensors"
        index["weight_map"][name] = shard if name.startswith("ghost") else file
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=says):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = open_checkpoint(sharded).files[:2]
    tensors = load_file(second)
    save_file({**tensors, **load_file(first)}, second)
    with pytest.raises(CheckpointError, match="is both in"):
        open_checkpoint(sharded)


def test_digest_changes_with_every_part(broken: Path) -> None:
    digests = {open_checkpoint(broken).digest()}
    assert open_checkpoint(broken).digest() in digests
    file = broken / SINGLE_NAME
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    digests.add(open_checkpoint(broken).digest())
    config = broken / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    digests.add(open_checkpoint(broken).digest())
    assert {len(digest) for digest in digests} == {32}
    assert len(digests) == 3


def test_digest_ignores_where_the_directory_lies(broken: Path, tmp_path: Path) -> None:
    before = open_checkpoint(broken).digest()
    assert open_checkpoint(broken.rename(tmp_path / "elsewhere")).digest() == before
