from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.eviction.calibration import Calibration, HeadRule

RULE = HeadRule(window=64, weight=2.0)
MADE = Calibration(model="0a" * 32, layers=((RULE, HeadRule(window=256, weight=0.5)),))


def test_what_is_written_is_found(tmp_path: Path) -> None:
    assert Calibration.find(tmp_path) is None
    path = MADE.write(tmp_path)
    assert path == tmp_path / Calibration.FILE
    assert Calibration.find(tmp_path) == MADE
    assert [one.name for one in tmp_path.iterdir()] == [Calibration.FILE]
    with pytest.raises(ConfigError, match="model: can't write"):
        MADE.write(tmp_path / "nowhere")


def test_another_model_is_refused() -> None:
    MADE.require(bytes([10]) * 32, 1, 2)
    with pytest.raises(ConfigError, match="measured on other weights, another config or dtype"):
        MADE.require(bytes(32), 1, 2)
    with pytest.raises(ConfigError, match="has 1 layers of 2 KV heads and the model 4 of 2"):
        MADE.require(bytes([10]) * 32, 4, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version"),
        ({"layers": []}, "the same number of heads"),
        ({"layers": [[{"window": 1}]]}, "weight"),
        ({"layers": [[{"window": 0, "weight": 1.0}]]}, "window"),
        ({"layers": [[{"window": 1, "weight": 0.0}]]}, "weight"),
    ],
)
def test_what_is_no_calibration_is_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    MADE.write(tmp_path)
    body = json.loads((tmp_path / Calibration.FILE).read_text())
    (tmp_path / Calibration.FILE).write_text(json.dumps(body | change))
    with pytest.raises(ConfigError, match=said):
        Calibration.find(tmp_path)
