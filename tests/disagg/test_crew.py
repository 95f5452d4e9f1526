"""Workers that can't be started are ended before whoever asked for them hears of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest

from kvkeep.disagg.crew import Crew
from kvkeep.disagg.members import CrewOptions, Member
from kvkeep.disagg.options import Role
from kvkeep.engine import messages as m
from kvkeep.engine.api import ModelInfo
from kvkeep.engine.client import MessageClient
from kvkeep.errors import ConfigError
from tests.disagg.crews import KEY
from tests.disagg.pairs import until


@dataclass
class Refused:
    """Workers that all refuse their options, and take a while to end."""

    there: threading.Barrier
    ending: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def __call__(self, name: str, _: Role) -> MessageClient:
        return MessageClient(_Transport(self, name))


class _Transport:
    def __init__(self, of: Refused, name: str) -> None:
        self._of = of
        self._name = name

    def start(self, deliver: Callable[[m.Reply], None]) -> None:
        deliver(m.Failed("ConfigError", "kv: no"))

    def send(self, command: m.Command) -> None:
        """It is gone."""

    def join(self, timeout_s: float) -> None:
        self._of.ending.append(self._name)
        self._of.there.wait(30.0)
        time.sleep(0.1)
        self._of.ended.append(self._name)


async def test_all_workers_have_ended_once_their_start_has_failed() -> None:
    hands = Refused(threading.Barrier(3))
    crew = Crew(hands, KEY, CrewOptions(prefill=1, decode=2))
    with pytest.raises(ConfigError, match="kv: no"):
        await crew.start()
    assert sorted(hands.ended) == ["decode-0", "decode-1", "prefill-0"]


async def test_a_cluster_ends_while_a_worker_that_refused_is_still_ending() -> None:
    before, hands = Refused(threading.Barrier(1)), Refused(threading.Barrier(2))
    crew = Crew(hands, KEY, CrewOptions(prefill=1, decode=1, again_s=0.01))
    info = cast("ModelInfo", None)  # nobody asks for it
    crew.lost(Member("decode-0", "decode", before("decode-0", "decode"), info, 1), "it is gone")
    await until(lambda: bool(hands.ending))
    closing = asyncio.create_task(crew.close())
    await asyncio.sleep(0)
    await asyncio.to_thread(hands.there.wait, 30.0)
    async with asyncio.timeout(30.0):
        await closing
    assert hands.ended == ["decode-0"]
