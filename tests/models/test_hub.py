from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.errors import ModelNotFound, UnsupportedModel
from kvkeep.models.hub import resolve


def test_directories_resolve_to_themselves(shared: Callable[[str], Path]) -> None:
    path = shared("llama")
    assert resolve(str(path)) == path


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ModelNotFound, match="is a file; give the checkpoint's directory"):
        resolve(str(tmp_path / "f"))


@pytest.mark.parametrize("name", ["nothing", "/no/such/directory", "./a/b", "a/b/c", "a b/c"])
def test_neither_directory_nor_id(name: str) -> None:
    with pytest.raises(ModelNotFound, match="neither a directory nor a hub id"):
        resolve(name)


def test_an_empty_name_is_not_the_working_directory() -> None:
    with pytest.raises(ModelNotFound, match="name is empty"):
        resolve("")


def test_ids_outside_the_cache_name_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match="pass --allow-download"):
        resolve("nobody/nothing")


def test_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match="the hub can't be reached"):
        resolve("nobody/nothing", allow_download=True)


class FakeHub:
    """A hub with one repository; remembers which patterns were asked for."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot
        self.asked: list[tuple[set[str], bool]] = []

    def download(self, _repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        self.asked.append((set(allow_patterns), local_files_only))
        return str(self.snapshot)


def test_downloads_check_the_config_before_any_weight(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(broken)
    monkeypatch.setattr("kvkeep.models.hub.snapshot_download", hub.download)
    assert resolve("owner/name", allow_download=True) == broken
    assert hub.asked == [
        ({"*.json", "*.jinja"}, False),
        ({"*.json", "*.jinja", "model*.safetensors"}, False),
    ]
    (broken / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Evil"}}')
    hub.asked.clear()
    with pytest.raises(UnsupportedModel, match="`auto_map`"):
        resolve("owner/name", allow_download=True)
    assert len(hub.asked) == 1


def test_without_the_flag_only_the_cache_is_read(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(broken)
    monkeypatch.setattr("kvkeep.models.hub.snapshot_download", hub.download)
    assert resolve("owner/name") == broken
    assert [offline for _, offline in hub.asked] == [True]
