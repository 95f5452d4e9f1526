"""Window and weight per layer and KV head, in a file beside the checkpoint they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from kvkeep.errors import ConfigError

FILE: Final = "kvkeep_evict.json"
_REMEDY: Final = "run `kvkeep model calibrate --evict` again, or remove it"


class HeadRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a KV head calls important, and for how long."""

    window: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    """w, in tokens."""
    weight: Annotated[float, msgspec.Meta(gt=0, le=1024)]
    """c, in shares of the mean weight."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rule of each KV head of each layer."""

    version: Literal[1] = 1
    model: str
    """Digest of the weights, config and dtype that it was measured on, in hexadecimal."""
    layers: tuple[tuple[HeadRule, ...], ...]
    """[L][Hkv]"""

    def __post_init__(self) -> None:
        if not self.layers or len({len(layer) for layer in self.layers} | {0}) != 2:
            raise ValueError("`layers` must hold the same number of heads for each layer")

    def require(self, digest: bytes) -> None:
        """Raise `ConfigError` where the model is not the one that was calibrated."""
        if self.model != digest.hex():
            raise ConfigError(
                f"evict: {FILE} was measured on other weights, another config or dtype: {_REMEDY}"
            )


def find(directory: Path) -> Calibration | None:
    """Return a checkpoint's calibration, if it has one; raises `ConfigError` for a broken one."""
    path = directory / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"evict: can't read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"evict: {path} is no calibration: {error}; {_REMEDY}") from None


def write(directory: Path, calibration: Calibration) -> Path:
    """Write a calibration beside its checkpoint, whole or not at all; return the file."""
    path = directory / FILE
    fresh = path.with_suffix(".tmp")
    try:
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"model: can't write {path}: {error.strerror}") from None
    return path
