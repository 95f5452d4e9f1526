"""`kvkeep model calibrate`: writes bits beside a checkpoint, which `--kv calibrated` serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.cli import run
from kvkeep.engine.build import build_core, codec_of
from kvkeep.engine.evictors import evictor_of
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from kvkeep.eviction.calibration import Calibration as HeadRules
from kvkeep.eviction.corm import Corm
from kvkeep.models.make import tiny
from kvkeep.quant.by_head import ByHead
from kvkeep.quant.calibration import Calibration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("qwen2", tmp_path_factory.mktemp("model") / "tiny")


def calibrated(model: Path, text: Path, *others: str) -> int:
    return run(["model", "calibrate", str(model), "--text", str(text), "--threads", "1", *others])


def test_what_is_measured_is_written_and_served(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("The heliotrope stands at the door of the north gate. " * 20)
    assert calibrated(model, text, "--budget-bits", "2.5") == 0
    said = capsys.readouterr()
    assert "divergence" in said.out
    assert "heliotrope" not in said.out + said.err + (model / Calibration.FILE).read_text()
    names = [name for layer in Calibration.read(model).layers for name in layer]
    assert (names.count("k4v2"), names.count("k2v2")) == (1, 5)
    options = EngineOptions(model=str(model), kv="calibrated", threads=1, kv_cache_bytes=32 << 20)
    codec = codec_of(options)
    assert isinstance(codec, ByHead)
    core = build_core(options)
    assert core.info.kv == "calibrated"
    assert core.info.bytes_per_token < 2 * core.info.num_layers * core.info.num_kv_heads * 16
    core.close()
    with pytest.raises(ConfigError, match="measured on other weights, another config or dtype"):
        build_core(
            EngineOptions(model=str(model), kv="auto", kv_auto_codec="calibrated", dtype="bfloat16")
        )


def test_windows_and_weights_are_written_for_eviction(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("The heliotrope stands at the door of the north gate. " * 20)
    assert calibrated(model, text, "--evict", "--most-lost", "0.3") == 0
    said = capsys.readouterr()
    assert "mean kept" in said.out
    found = HeadRules.find(model)
    assert found is not None
    assert {len(layer) for layer in found.layers} == {2}
    evictor = evictor_of(EngineOptions(model=str(model), evict="corm"))
    assert isinstance(evictor, Corm)
    assert evictor.watch(2000).first == 2000 - max(r.window for one in found.layers for r in one)
    (model / HeadRules.FILE).unlink()


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["--most-lost", "0.1"], "most_lost: bits are not lost by weight"),
        (["--budget-bits", "3", "--quality", "0.1"], "quality: give a budget or a quality"),
        (["--evict", "--budget-bits", "3"], "budget_bits: eviction has no bits to choose"),
        (["--evict", "--quality", "0.1"], "quality: eviction has no bits to choose"),
        (["--budget-bits", "5"], "budget_bits: 5 must lie between 2 and 4"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: list[str], sentence: str
) -> None:
    text = tmp_path / "text"
    text.write_text("The north gate. " * 100)
    assert calibrated(model, text, *told) == 1
    assert sentence in capsys.readouterr().err


def test_a_sealed_model_is_written_and_its_weights_stay_shut(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvkeep.shield.secret.forbid_dumps", lambda: None)
    assert run(["model", "seal", str(model), "--out", "sealed"]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "Wrote sealed: 1 sealed files, by a key of file." in said
    assert "whoever reads the key file" in said
    monkeypatch.setenv("KVKEEP_KERNEL", "reference")
    assert run(["doctor", "--model", "sealed"]) == 0
    assert "can be served (qwen2); sealed: an engine needs its key" in capsys.readouterr().out
    assert run(["model", "info", "sealed"]) == 1
    assert "is sealed; only an engine that has its key opens it" in capsys.readouterr().err
    assert run(["model", "seal", str(model), "--out", "sealed"]) == 1
    assert "out: can't write sealed: is not empty" in capsys.readouterr().err
