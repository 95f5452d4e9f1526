from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.quant.calibration import Calibration
from kvkeep.types import Layout

MADE = Calibration(model="0a" * 32, layers=(("k4v2", "k2v2"), ("k2v2", "k2v2")))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = MADE.write(tmp_path)
    assert path == tmp_path / Calibration.FILE
    assert Calibration.read(tmp_path) == MADE
    assert Calibration.read(tmp_path).layouts()[0] == (Layout.K4V2, Layout.K2V2)
    assert [one.name for one in tmp_path.iterdir()] == [Calibration.FILE]


def test_another_model_is_refused() -> None:
    MADE.require(bytes([10]) * 32, 2, 2)
    with pytest.raises(ConfigError, match="was measured on other weights") as caught:
        MADE.require(bytes(32), 2, 2)
    with pytest.raises(ConfigError, match="has 2 layers of 2 KV heads and the model 4 of 2"):
        MADE.require(bytes([10]) * 32, 4, 2)
    assert "kvkeep model calibrate" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version"),
        ({"layers": [["k3v2"]]}, "k3v2"),
        ({"layers": []}, "layers"),
        ({"layers": [["k2v2"], ["k2v2", "k2v2"]]}, "the same number of heads"),
        ({"layers": [[]]}, "the same number of heads"),
        ({"window": 3}, "window"),
    ],
)
def test_what_is_no_calibration_is_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    MADE.write(tmp_path)
    body = json.loads((tmp_path / Calibration.FILE).read_text())
    (tmp_path / Calibration.FILE).write_text(json.dumps(body | change))
    with pytest.raises(ConfigError, match=said):
        Calibration.read(tmp_path)


def test_a_file_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no kvkeep_kv\.json; run `kvkeep model calibrate`"):
        Calibration.read(tmp_path)
    with pytest.raises(ConfigError, match="model: can't write"):
        MADE.write(tmp_path / "nowhere")
