"""Which transform an engine runs with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, get_args

from kvkeep.engine.options import EngineOptions, ShieldName
from kvkeep.engine.sealers import require_attested
from kvkeep.errors import ConfigError
from kvkeep.shield.drbg import KEY_BYTES
from kvkeep.shield.policy import NoShield, Shield
from kvkeep.shield.transform import LinearShield

_MODES: Final = "use off, seal, tile, perm, orth, mask or tee"


def shield_of(options: EngineOptions) -> Shield:
    """Return the transform the options ask for; raises `ConfigError`.

    Sealing transforms nothing: it begins below memory.
    """
    match options.shield:
        case "perm" | "orth" | "mask" as mode:
            return LinearShield(mode, key_of(options.transform_key), options.transform_epoch)
        case "tee":
            require_attested(options.keys)
        case name if name is not None and name not in get_args(ShieldName):
            raise ConfigError(f"shield: {name!r} is no mode; {_MODES}")
    if options.transform_key is not None:
        raise ConfigError("transform_key is given and nothing is transformed; set shield to orth")
    return NoShield()


def key_of(file: str | None) -> bytes:
    """Return the engine's key: the file's 32 bytes, or random ones for this run."""
    if file is None:
        return os.urandom(KEY_BYTES)
    path = Path(file)
    try:
        mode, key = path.stat().st_mode & 0o777, path.read_bytes()
    except OSError as error:
        raise ConfigError(f"transform_key: can't read {path}: {error.strerror}") from None
    if mode & 0o177:
        raise ConfigError(f"transform_key: {path} has mode {mode:04o}; run chmod 600 on it")
    if len(key) != KEY_BYTES:
        raise ConfigError(f"transform_key: {path} holds {len(key)} bytes; {KEY_BYTES} are needed")
    return key
