from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.sim.costs import Costs
from tests.sim.made import COSTS
from tools import fit_costs


def measured() -> dict[str, Any]:
    """Return a result whose rows are what known costs give."""
    rows: list[dict[str, object]] = []
    for name, codec in COSTS.codecs.items():
        told = {"bytes_per_token": codec.bytes_per_token, "window_tokens": codec.window_tokens}
        rows.append({"part": "codec", "kv": name, **told})
        for tokens in (64, 256, 1024):
            for context in (0, 1024, 4096):
                seconds = COSTS.chunk_time_s(tokens, context) + codec.encode_s_per_token * tokens
                place = {"tokens": tokens, "context": context, "seconds": seconds}
                rows.append({"part": "chunk", "kv": name, **place})
        for count in (1, 2, 8):
            for context in (500, 5000):
                seconds = COSTS.step_time_s(name, count, context)
                place = {"rows": count, "context": context, "seconds": seconds}
                rows.append({"part": "step", "kv": name, **place})
    meta = {
        "params": {"model": "toy", "threads": 2},
        "machine": {"cpu": "a processor"},
        "date": "2026-01-02T03:04:05",
        "commit": "0123456789abcdef",
    }
    return {"meta": meta, "rows": rows}


def test_what_steps_took_gives_back_what_they_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step_costs.json"
    path.write_text(json.dumps(measured()), encoding="utf-8")
    assert fit_costs.main([str(path)]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=Costs)
    assert found.source == "toy's shapes, 2 threads, a processor, 2026-01-02, commit 01234567"
    assert found.step_time_s("k2v2", 4, 9000) == pytest.approx(COSTS.step_time_s("k2v2", 4, 9000))
    assert found.chunk_time_s(512, 2048) == pytest.approx(COSTS.chunk_time_s(512, 2048))
    encode = {name: codec.encode_s_per_token for name, codec in found.codecs.items()}
    assert encode == pytest.approx({"bf16": 0.0, "k2v2": 1e-5})
    assert found.codecs["k2v2"].window_tokens == 128


def test_without_a_file_it_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_costs.main([]) == 2
    assert "Usage: python -m tools.fit_costs" in capsys.readouterr().err
