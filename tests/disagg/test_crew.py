"""Workers that can't be started are ended before whoever asked for them hears of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvkeep.disagg.crew import Crew
from kvkeep.disagg.members import CrewOptions
from kvkeep.disagg.options import Role
from kvkeep.engine import messages as m
from kvkeep.engine.client import MessageClient
from kvkeep.errors import ConfigError
from tests.disagg.crews import KEY


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
