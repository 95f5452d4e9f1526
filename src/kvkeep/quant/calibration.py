"""Bits per layer and KV head, in a file beside the checkpoint they were measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from kvkeep.errors import ConfigError
from kvkeep.types import Layout

FILE: Final = "kvkeep_kv.json"
_REMEDY: Final = "run `kvkeep model calibrate` again"


CodeName = Literal["k8v8", "k4v4", "k4v2", "k2v2"]
NAMES: Final[dict[Layout, CodeName]] = {
    Layout.K8V8: "k8v8",
    Layout.K4V4: "k4v4",
    Layout.K4V2: "k4v2",
    Layout.K2V2: "k2v2",
}


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which codes each KV head of each layer is stored in."""

    version: Literal[1] = 1
    model: str
    """Digest of the weights, config and dtype that it was measured on, in hexadecimal."""
    layers: tuple[tuple[CodeName, ...], ...]
    """[L][Hkv]"""

    def __post_init__(self) -> None:
        if not self.layers or len({len(layer) for layer in self.layers} | {0}) != 2:
            raise ValueError("`layers` must hold the same number of heads for each layer")

    @classmethod
    def of(cls, model: str, layouts: Sequence[Sequence[Layout]]) -> Calibration:
        """Return the calibration of layouts [L][Hkv]."""
        layers = tuple(tuple(NAMES[one] for one in layer) for layer in layouts)
        return cls(model=model, layers=layers)

    def layouts(self) -> tuple[tuple[Layout, ...], ...]:
        """Return [L][Hkv] layouts."""
        return tuple(tuple(Layout[name.upper()] for name in layer) for layer in self.layers)

    def require(self, digest: bytes) -> None:
        """Raise `ConfigError` where the model is not the one that was calibrated."""
        if self.model != digest.hex():
            raise ConfigError(
                f"kv: {FILE} was measured on other weights, another config or dtype: {_REMEDY},"
                " or choose another form"
            )


def read(directory: Path) -> Calibration:
    """Return a checkpoint's calibration; raises `ConfigError` where there is no valid one."""
    path = directory / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except FileNotFoundError:
        raise ConfigError(
            f"kv: {directory} has no {FILE}; run `kvkeep model calibrate` first, or choose"
            " another form"
        ) from None
    except OSError as error:
        raise ConfigError(f"kv: can't read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"kv: {path} is no calibration: {error}; {_REMEDY}") from None


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
