"""Rows that leave are those of the pages they are stored in, wherever they are taken from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvkeep.cache.tiers import OpenRows
from kvkeep.engine.rows import RowStore
from tests.disagg.pairs import answers, engine_options, pair_of
from tests.disagg.test_handover import DRAWN, PROMPTS
from tests.engines import request


@pytest.mark.parametrize("kv", ["bf16", "k2v2", "auto"])
@pytest.mark.parametrize(("rows", "read_back"), [(512, False), (100, True)])
async def test_they_are_the_steps_own_where_it_has_all_of_them(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kv: str, rows: int, *, read_back: bool
) -> None:
    reads: list[tuple[str, int]] = []
    same: list[bool] = []
    read = RowStore.read

    def counted(self: RowStore, rows: OpenRows, layer: int) -> bytes:
        reads.append((rows.request_id, layer))
        return read(self, rows, layer)

    monkeypatch.setattr(RowStore, "read", counted)
    options: dict[str, Any] = {"kv": kv, "max_num_batched_tokens": rows, "chunk_tokens": rows}
    if kv == "auto":
        options["kv_auto_tokens"] = 300
    async with pair_of(engine_options(tiny["qwen2"], shield="off", **options)) as pair:
        stored, runner = pair.sends.rows_stored, pair.prefill.core._runner

        def watched(rows: OpenRows, layer: int, data: bytes) -> None:
            same.append(data == read(runner._rows, rows, layer))
            stored(rows, layer, data)

        pair.sends.rows_stored = watched  # type: ignore[method-assign]
        asked = [request(one, DRAWN, id=str(i)) for i, one in enumerate(PROMPTS)]
        await answers(pair.client, *asked)
        await pair.quiet()
    assert same
    assert all(same)
    assert bool(reads) is read_back
