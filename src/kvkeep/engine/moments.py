"""When what happened to a request, for those who measure."""

from __future__ import annotations

import msgspec


class Moments(msgspec.Struct, kw_only=True):
    """When what happened to a request in one engine; None: it did not.

    Seconds of the host's monotonic clock: those of several hosts are not to be compared.
    """

    arrived_s: float = 0.0
    begun_s: float | None = None
    """Its first step began."""
    encode_s: float = 0.0
    """What coding its pages took."""
    first_token_s: float | None = None
    """It was sampled, or another engine's was heard of."""
    received_s: float | None = None
    """The last of what came of it from another engine had come."""
    received_bytes: int = 0
    """Of pages."""
    received_rows_bytes: int = 0
    """Of the rows behind the last whole ones."""
    received_pages: int = 0
    installed_s: float | None = None
    """Pages lay in the cache, rows in memory."""
    resumed_s: float | None = None
    """The first step behind its first token began."""
    ended_s: float = 0.0
