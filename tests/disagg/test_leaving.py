"""Rows that leave are those of the pages they are stored in, wherever they are taken from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.cache.tiers import OpenRows
from kvkeep.engine.api import Handover
from kvkeep.engine.engine import EngineCore
from kvkeep.engine.rows import NewRows, RowStore
from tests.disagg.pairs import answers, engine_options, pair_of
from tests.disagg.test_handover import DRAWN, PROMPTS
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request


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


def left(core: EngineCore, prompts: list[list[int]]) -> list[bool]:
    """Return of each layer's rows of each prompt, one a tenant, whether they are those in pages."""
    runner, same = core._runner, []

    class Listens:
        def layer_closed(self, *_: object) -> None:
            """Pages are of no interest."""

        def rows_stored(self, rows: OpenRows, layer: int, data: bytes) -> None:
            same.append(data == runner._rows.read(rows, layer))

    runner._parts = replace(runner._parts, listeners=(Listens(),))
    handover = Handover(role="prefill", key=bytes(32))
    asked = [request(one, DRAWN, id=name, tenant=name) for name, one in zip("ab", prompts)]
    drive(core, [msgspec.structs.replace(one, handover=handover) for one in asked])
    assert len(same) == 2 * core.info.num_layers
    return same


@pytest.mark.parametrize("kv", ["bf16", "k2v2"])
@pytest.mark.parametrize(("rows", "own"), [(512, 2), (70, 0)])
def test_each_prompt_of_a_step_has_its_own(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kv: str, rows: int, own: int
) -> None:
    """In chunks of 70 both end in one step, and what leaves of them was begun in one before."""
    begun: set[int] = set()
    told = NewRows.told

    def noted(self: NewRows, at: int, count: int) -> bytes:
        begun.add(at)
        return told(self, at, count)

    monkeypatch.setattr(NewRows, "told", noted)
    core = core_for(
        tiny["qwen2"], threads=1, kv=kv, max_num_batched_tokens=2 * rows, chunk_tokens=rows
    )
    assert all(left(core, [prompt_of(209, 1), prompt_of(150, 2)]))
    assert len(begun) >= own
