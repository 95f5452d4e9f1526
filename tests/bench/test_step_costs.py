"""What steps cost behind contexts that nobody computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import step_costs
from bench.made_up import MadeUpPages
from bench.ours import Ours
from bench.quant_e2e import Side
from bench.step_costs import chunk_rows
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.eviction.policy import KeepAll
from kvkeep.quant.codec import Codec, Float, KVShape
from kvkeep.quant.hack import Hack
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield
from kvkeep.types import Layout


@pytest.mark.parametrize("codec", [Float(), Hack(Layout.K2V2)], ids=lambda codec: codec.name)
def test_a_chunk_is_measured_behind_every_context(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, codec: Codec
) -> None:
    monkeypatch.setattr(step_costs, "CHUNKS", (64, 128))
    monkeypatch.setattr(step_costs, "BEFORE", (0, 256))
    monkeypatch.setattr(Ours, "prompt", lambda _, length: tuple(range(1, length + 1)))
    probe = Ours(tiny["qwen2"], threads=1).core.info
    shape = KVShape(probe.num_layers, probe.num_kv_heads, probe.head_dim, Layout.BF16)
    pages = MadeUpPages(codec, shape)
    techniques = Techniques(codec, NoShield(), KeepAll())
    parts = Parts(techniques=techniques, policy=ShareNothing(), tier=pages)
    side = Side(Ours(tiny["qwen2"], threads=1, kv_cache_bytes=16 << 20, parts=parts))
    rows = list(chunk_rows(side, pages, codec, 2))
    assert {row["context"] for row in rows} == {0, 256}
    for row in rows:
        assert row["tokens"] in {64, 128}
        assert float(row["seconds"] or 0) > 0
    assert sum(int(row["turns"] or 0) for row in rows) == 8
