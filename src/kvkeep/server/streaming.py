"""Server-sent events: the framing, the silence, and the ways a stream may end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from kvkeep.server.generation import Event
from kvkeep.server.replies import Tally, Usage
from kvkeep.server.schemas import StreamOptions

KEEPALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class UsageMode:
    """Where a stream tells its usage."""

    at_end: bool = False
    always: bool = False

    @classmethod
    def of(cls, options: StreamOptions | None) -> UsageMode:
        """Return what `stream_options` asks for."""
        if options is None:
            return cls()
        return cls(
            bool(options.include_usage),
            bool(options.include_usage and options.continuous_usage_stats),
        )

    def of_event(self, tally: Tally) -> Usage | UnsetType | None:
        """Return the usage field of an event with tokens: absent unless usage was asked for."""
        if self.always:
            return tally.usage()
        return None if self.at_end else UNSET


class Events(Protocol):
    """Renders a request's chunks."""

    def render(self, event: Event, tally: Tally) -> bytes:
        """Return the events of one chunk."""

    def end(self, tally: Tally) -> bytes:
        """Return what follows the last token."""


class Answer(Protocol):
    """Collects a request's chunks."""

    def add(self, event: Event) -> None:
        """Take what is new."""

    def json(self, tally: Tally) -> bytes:
        """Return the whole reply."""


def sse(body: msgspec.Struct) -> bytes:
    """Return one event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
