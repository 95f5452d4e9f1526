"""What a server may be told at start: plain frozen records, filled from the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvkeep.addresses import is_loopback
from kvkeep.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Caps checked before any tokenising, per request unless said otherwise."""

    max_body_bytes: int = 4 << 20
    max_body_wait_s: float = 30.0
    """How long a client may take to send its body."""
    max_json_depth: int = 16
    max_prompt_chars: int = 2_000_000
    max_messages: int = 4096
    max_n: int = 16
    max_prompts: int = 256
    """Prompts of one batch for `/v1/completions`."""
    max_sequences: int = 256
    """Prompts of a batch times `n`."""
    max_stops: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 64
    max_logit_bias: int = 1024
    max_logprobs: int = 20
    no_auth_concurrency: int = 256
    """Requests at a time in all without authentication; with it, each tenant has its own cap."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the public port behaves."""

    served_names: tuple[str, ...] = ()
    """Names a request may ask for; the model's own name where empty."""
    no_auth: bool = False
    keepalive_s: float = 15.0
    """Silence after which a stream carries a comment."""
    retry_after_s: int = 1
    """A constant: the live load is nobody's to see."""
    drain_s: float = 30.0
    deadline_s: float | None = None
    """Seconds a request may run; None for as long as it takes."""
    share_pool: float = 0.3
    """Part of the pool that shared pages get where any tenant shares."""
    share_by_salt: bool = False
    """Whether a request's scope is its salts' alone, whoever sends it."""
    share_always: bool = False
    """Whether pages are shared without a group."""
    audit_consent: str | None = None
    """Token shown to everybody at `CONSENT_PATH`; None consents to no audit."""
    poll_s: float = 1.0
    """How often the tenant file and the engine are looked at."""
    shred: Callable[[str], bytes] | None = None
    """Destroys the keys of a tenant's sealed pages, away from the loop, and returns the receipt."""
    text_workers: int = 2
    """Threads that parse, render templates and tokenise."""
    limits: ServerLimits = field(default_factory=ServerLimits)

    def __post_init__(self) -> None:
        for name in ("keepalive_s", "retry_after_s", "poll_s", "text_workers"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0")
        if self.drain_s < 0:
            raise ConfigError("drain_s must not be negative")


@dataclass(frozen=True, slots=True)
class Bind:
    """Where a port listens: host and port (0 picks a free one), or a Unix socket's path."""

    host: str = "127.0.0.1"
    port: int = 0
    unix: Path | None = None

    def is_local(self) -> bool:
        """Return whether only this machine can reach it."""
        return self.unix is not None or is_loopback(self.host)

    def url(self) -> str:
        """Return the address for people."""
        if self.unix is not None:
            return f"unix:{self.unix}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"
