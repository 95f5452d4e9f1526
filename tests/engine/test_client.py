"""The asyncio client over a thread and over a process: answers, cancellation, failure, the end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.engine.api import FinishReason, SamplingParams
from kvkeep.engine.client import MessageClient
from kvkeep.engine.local import local_engine
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.process import spawn_engine
from kvkeep.errors import ConfigError, EngineError, EngineStopped, ModelNotFound
from tests.engines import request

Start = Callable[[EngineOptions], MessageClient]
ENDLESS = SamplingParams(max_tokens=100_000, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


def options(path: Path) -> EngineOptions:
    return EngineOptions(model=str(path), threads=1, kv_cache_bytes=32 << 20)


@pytest.mark.parametrize("start", [local_engine, spawn_engine])
async def test_a_client_from_start_to_end(tiny: dict[str, Path], start: Start) -> None:
    progress: list[tuple[int, int]] = []
    client = start(options(tiny["llama"]), lambda done, total: progress.append((done, total)))  # type: ignore[call-arg]
    info = await client.info()
    assert info.num_pages > 0
    assert progress[-1][0] == progress[-1][1]
    with pytest.raises(ConfigError):
        await client.set_tenants({"a": 0.9, "b": 0.9})
    await client.set_tenants({"a": 0.5, "b": 0.5})
    chunks = [c async for c in client.submit(request([1, 2, 3], SHORT))]
    assert chunks[-1].finish is FinishReason.LENGTH
    stream = client.submit(request([1, 2, 3], ENDLESS, id="endless"))
    await anext(stream)
    with pytest.raises(EngineError):
        client.submit(request([1], SHORT, id="endless"))
    await stream.aclose()
    await client.submit(request([1, 2, 3], ENDLESS, id="unread")).aclose()
    await wait_for_quiet(client)
    many = [client.submit(request([i + 1], SHORT, id=f"m{i}")) for i in range(20)]
    ends = await asyncio.gather(*[collect(s) for s in many])
    assert ends == [FinishReason.LENGTH] * 20
    await client.close(drain_s=1.0)
    with pytest.raises(EngineStopped):
        client.submit(request([1], SHORT))


async def collect(stream: object) -> FinishReason | None:
    last = None
    async for chunk in stream:  # type: ignore[attr-defined]
        last = chunk.finish
    return last


async def wait_for_quiet(client: MessageClient) -> None:
    for _ in range(200):
        if (await client.stats()).requests_running == 0:
            return
        await asyncio.sleep(0.01)
    pytest.fail("a closed stream's request still runs")


async def test_a_killed_engine_process_ends_every_stream(tiny: dict[str, Path]) -> None:
    client = spawn_engine(options(tiny["llama"]))
    await client.info()
    await client.set_tenants({"a": 1.0})
    stream = client.submit(request([1, 2, 3], ENDLESS))
    await anext(stream)
    os.kill(client._transport._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(EngineStopped):
        await asyncio.wait_for(collect(stream), 10)
    with pytest.raises(EngineStopped):
        await client.stats()
    await client.close()


async def test_a_model_that_can_not_be_loaded_is_told_to_whoever_asks(tmp_path: Path) -> None:
    client = local_engine(options(tmp_path / "nothing"))
    with pytest.raises(ModelNotFound):
        await client.info()
    with pytest.raises(EngineStopped):
        await client.stats()
    await client.close()
