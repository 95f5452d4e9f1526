"""From what the user typed to a checkpoint directory."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from kvkeep.errors import ModelNotFound
from kvkeep.models.check import check_config
from kvkeep.models.checkpoint import read_json

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SMALL_FILES = ("*.json", "*.jinja")
WEIGHT_FILES = ("model*.safetensors",)


def resolve(path_or_id: str, *, allow_download: bool = False) -> Path:
    """Return the directory of a checkpoint; raises `ModelNotFound` where there is none.

    A download takes the small files first and checks the config before any weight; only
    safetensors, JSON and template files are ever fetched.
    """
    if not path_or_id:
        raise ModelNotFound("the model's name is empty; give a directory or a hub id")
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise ModelNotFound(f"{path_or_id} is a file; give the checkpoint's directory")
    if not HUB_ID.fullmatch(path_or_id) or path_or_id.startswith("."):
        raise ModelNotFound(f"{path_or_id} is neither a directory nor a hub id like owner/name")
    if allow_download:
        small = _snapshot(path_or_id, SMALL_FILES, offline=False)
        if (small / "config.json").is_file():
            check_config(read_json(small / "config.json"))
    return _snapshot(path_or_id, SMALL_FILES + WEIGHT_FILES, offline=not allow_download)


def _snapshot(hub_id: str, patterns: tuple[str, ...], *, offline: bool) -> Path:
    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=list(patterns), local_files_only=offline)
        )
    except LocalEntryNotFoundError as error:
        remedy = "pass --allow-download to fetch it" if offline else "the hub can't be reached"
        raise ModelNotFound(
            f"{hub_id} is neither a directory nor in the local cache; {remedy}"
        ) from error
    except HFValidationError as error:
        raise ModelNotFound(f"{hub_id} is neither a directory nor a valid hub id") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFound(f"{hub_id} can't be downloaded: {type(error).__name__}") from error
