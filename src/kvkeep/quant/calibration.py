"""Bits per layer and KV head, in a file beside the checkpoint they were measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal

from kvkeep.errors import ConfigError
from kvkeep.measured import Measured
from kvkeep.types import Layout

CodeName = Literal["k8v8", "k4v4", "k4v2", "k2v2"]
NAMES: Final[dict[Layout, CodeName]] = {
    Layout.K8V8: "k8v8",
    Layout.K4V4: "k4v4",
    Layout.K4V2: "k4v2",
    Layout.K2V2: "k2v2",
}


class Calibration(Measured[CodeName], frozen=True):
    """Which codes each KV head of each layer is stored in."""

    FILE: ClassVar[str] = "kvkeep_kv.json"
    SETTING: ClassVar[str] = "kv"
    REMEDY: ClassVar[str] = "run `kvkeep model calibrate` again, or choose another form"

    @classmethod
    def of(cls, model: str, layouts: Sequence[Sequence[Layout]]) -> Calibration:
        """Return the calibration of layouts [L][Hkv]."""
        layers = tuple(tuple(NAMES[one] for one in layer) for layer in layouts)
        return cls(model=model, layers=layers)

    @classmethod
    def read(cls, directory: Path) -> Calibration:
        """Return a checkpoint's calibration; raises `ConfigError` where there is no valid one."""
        found = cls.find(directory)
        if found is None:
            raise ConfigError(
                f"kv: {directory} has no {cls.FILE}; run `kvkeep model calibrate` first, or choose"
                " another form"
            )
        return found

    def layouts(self) -> tuple[tuple[Layout, ...], ...]:
        """Return [L][Hkv] layouts."""
        return tuple(tuple(Layout[name.upper()] for name in layer) for layer in self.layers)
