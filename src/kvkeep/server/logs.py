"""One JSON line per request: who, what, how long; never what was said."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import msgspec

REQUEST_LOGGER = "kvkeep.request"
SERVER_LOGGER = "kvkeep.server"


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request; filled while it runs, written when it has ended."""

    id: str
    route: str = "unmatched"
    method: str = ""
    tenant: str | None = None
    key: str | None = None
    status: int = 0
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    finish: str | None = None
    kv: str | None = None
    """How its pages were stored."""
    error: str | None = None
    """The error's code, one of a fixed set."""
    ignored: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic)

    def first_token(self) -> None:
        """Note when the first token came."""
        if self.ttft_s is None:
            self.ttft_s = time.monotonic() - self.started

    def line(self) -> str:
        """Return the record as one line of JSON."""
        return msgspec.json.encode(
            {
                "time": time.time(),
                "id": self.id,
                "tenant": self.tenant,
                "key": self.key,
                "method": self.method,
                "route": self.route,
                "status": self.status,
                "stream": self.stream,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens,
                "ttft_s": self.ttft_s and round(self.ttft_s, 6),
                "duration_s": round(time.monotonic() - self.started, 6),
                "finish": self.finish,
                "kv": self.kv,
                "error": self.error,
                "ignored": self.ignored,
            }
        ).decode()


def log_request(record: RequestRecord) -> None:
    """Write a request's line."""
    logging.getLogger(REQUEST_LOGGER).info("%s", record.line())


def log_event(event: str, **details: str | float) -> None:
    """Write a line about the server; `details` are fixed words and numbers, never a client's."""
    text = msgspec.json.encode({"time": time.time(), "event": event, **details}).decode()
    logging.getLogger(SERVER_LOGGER).warning("%s", text)


def log_failure(record: RequestRecord, error: BaseException) -> None:
    """Write an unforeseen error's type and places in the code; its words may hold content."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    log_event("unexpected_error", id=record.id, type=type(error).__name__, at=" ".join(places[-6:]))
