"""A checkpoint is sealed by a provider's key and opened by a key process, at load alone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from kvkeep.engine.api import SamplingParams
from kvkeep.engine.build import build_core
from kvkeep.engine.options import EngineOptions, KeyOptions
from kvkeep.engine.sealers import provider_of, seal_model, unwrap_of
from kvkeep.errors import CheckpointError, ConfigError, KeysUnavailable
from kvkeep.models.checkpoint import open_checkpoint
from kvkeep.shield.cipher import KEY_BYTES
from kvkeep.shield.folder import MANIFEST, Body, open_folder
from kvkeep.shield.keys import unwrap_model
from kvkeep.shield.providers.local import make_key_file
from tests.engines import drive, request, tokens

SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def keys(folder: Path, name: str = "kek") -> KeyOptions:
    path = folder / name
    if not path.exists():
        make_key_file(path)
    return KeyOptions(provider=f"file:{path}", store=str(folder / "store.json"))


@pytest.fixture
def sealed(tiny: dict[str, Path], tmp_path: Path) -> Path:
    target = tmp_path / "sealed"
    body = seal_model(keys(tmp_path), tiny["qwen2"], target)
    assert (body.provider, len(body.sealed)) == ("file", 1)
    return target


def answer(model: Path, own: KeyOptions) -> tuple[str, list[int]]:
    core = build_core(EngineOptions(model=str(model), threads=1, kv_cache_bytes=8 << 20, keys=own))
    core.set_tenants({"a": 1.0})
    said = tokens(drive(core, [request([5, 6, 7] * 9, SHORT, id="r", tenant="a")])["r"])
    core.close()
    return core.info.digest, said


def test_a_sealed_model_answers_as_the_plain_one_and_makes_no_store(
    tiny: dict[str, Path], sealed: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in sealed.iterdir()}
    assert answer(sealed, keys(tmp_path)) == answer(tiny["qwen2"], keys(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in sealed.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kek", "sealed"]


def test_of_servers_that_start_at_a_time_one_makes_the_key_file(tmp_path: Path) -> None:
    for attempt in range(20):
        options = KeyOptions(store=str(tmp_path / str(attempt) / "store.json"))
        together = Barrier(4)

        def start(options: KeyOptions = options, together: Barrier = together) -> bytes:
            together.wait()
            return Path(provider_of(options).parts[0]).read_bytes()

        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda _, start=start: start(), range(4)))
        assert len(set(read)) == 1
        assert len(read[0]) == KEY_BYTES


def test_a_key_that_is_another_or_missing_is_one_sentence(sealed: Path, tmp_path: Path) -> None:
    def refused(own: KeyOptions, sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            open_checkpoint(sealed, unwrap_of(own))

    refused(keys(tmp_path, "other"), "file does not open the model's key; name the provider")
    refused(KeyOptions(provider=f"file:{tmp_path / 'gone'}"), "can't read .*gone")
    store = str(tmp_path / "elsewhere" / "store.json")
    refused(KeyOptions(store=store), "sealed by a key of file; name its provider")
    assert not (tmp_path / "elsewhere").exists()
    away = KeyOptions(provider="vault:http://127.0.0.1:9,kvkeep")
    os.environ["VAULT_TOKEN"] = "t"
    try:
        refused(away, "vault can't be used now")
    finally:
        del os.environ["VAULT_TOKEN"]


def test_another_key_of_the_same_provider_does_not_open(sealed: Path, tmp_path: Path) -> None:
    def swapped(body: Body) -> memoryview:
        return unwrap_model(f"file:{tmp_path / 'kek'}", "0" * 32, body.wrapped)

    with pytest.raises(CheckpointError, match="wrapped by another key"):
        open_checkpoint(sealed, swapped)


def test_a_key_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvkeep.shield.keys.sys.executable", "/bin/false")
    with pytest.raises(KeysUnavailable, match="the key process died"):
        unwrap_model("file:x", "id", b"")


def test_a_key_of_ones_own_is_made_where_none_is_named(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    own = KeyOptions(store=str(tmp_path / "store.json"))
    seal_model(own, tiny["qwen2"], tmp_path / "sealed")
    assert len(open_folder(tmp_path / "sealed", unwrap_of(own))) == 1


@pytest.mark.parametrize("spoil", ["full", "sealed", "vault"])
def test_what_cannot_be_sealed_is_one_sentence(
    tiny: dict[str, Path], sealed: Path, tmp_path: Path, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "t")
    source, target, own = tiny["qwen2"], tmp_path / "new", keys(tmp_path)
    if spoil == "full":
        target = sealed
    elif spoil == "sealed":
        source = sealed
    else:
        own = KeyOptions(provider="vault:http://127.0.0.1:9,kvkeep")
    error = CheckpointError if spoil == "sealed" else ConfigError
    sentence = {
        "full": "out: can't write .*sealed: is not empty; name a new one",
        "sealed": "is sealed; only an engine",
        "vault": "vault can't be used now",
    }[spoil]
    with pytest.raises(error, match=sentence):
        seal_model(own, source, target)
    assert (sealed / MANIFEST).is_file()
