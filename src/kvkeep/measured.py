"""What was measured of a checkpoint, for each KV head of each layer, in a file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Generic, Literal, Self, TypeVar

import msgspec

from kvkeep.errors import ConfigError
from kvkeep.files import READABLE, replace_file

Head = TypeVar("Head")


class Measured(
    msgspec.Struct, Generic[Head], frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """One value per KV head; a subclass names its file, and the setting that reads it."""

    FILE: ClassVar[str]
    SETTING: ClassVar[str]
    REMEDY: ClassVar[str]

    version: Literal[1] = 1
    model: str
    """Digest of the weights, config and dtype that it was measured on, in hexadecimal."""
    layers: tuple[tuple[Head, ...], ...]
    """[L][Hkv]"""

    def __post_init__(self) -> None:
        if not self.layers or len({len(layer) for layer in self.layers} | {0}) != 2:
            raise ValueError("`layers` must hold the same number of heads for each layer")

    def require(self, digest: bytes, num_layers: int, num_kv_heads: int) -> None:
        """Raise `ConfigError` where the model is not the one that was measured."""
        shape, found = (num_layers, num_kv_heads), (len(self.layers), len(self.layers[0]))
        if found != shape:
            raise ConfigError(
                f"{self.SETTING}: {self.FILE} has {found[0]} layers of {found[1]} KV heads and the"
                f" model {shape[0]} of {shape[1]}: {self.REMEDY}"
            )
        if self.model != digest.hex():
            raise ConfigError(
                f"{self.SETTING}: {self.FILE} was measured on other weights, another config or"
                f" dtype: {self.REMEDY}"
            )

    @classmethod
    def find(cls, directory: Path) -> Self | None:
        """Return what lies beside a checkpoint; raises `ConfigError` for a broken file."""
        path = directory / cls.FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{cls.SETTING}: can't read {path}: {error.strerror}") from None
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{cls.SETTING}: {path} is no calibration: {error}; {cls.REMEDY}"
            ) from None

    def write(self, directory: Path) -> Path:
        """Write it beside its checkpoint, whole or not at all; return the file."""
        path = directory / self.FILE
        raw = msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"
        try:
            replace_file(path, raw, READABLE)
        except OSError as error:
            raise ConfigError(f"model: can't write {path}: {error.strerror}") from None
        return path
