"""How a request's pages are stored: from the request and its tenant's setting, never from load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Controller(Protocol):
    """Chooses among the codecs of an engine."""

    def choose(self, length_tokens: int, *, may_code: bool) -> str:
        """Return a codec's name for a request of at most so many tokens, prompt and answer.

        `may_code` is its tenant's setting. An answer's bits follow from the choice, so nothing that
        others do, and nothing that happens to be cached, may enter it.
        """


@dataclass(frozen=True, slots=True)
class Fixed:
    """All pages in one form."""

    codec: str

    def choose(self, length_tokens: int, *, may_code: bool) -> str:
        """Return the one."""
        return self.codec


@dataclass(frozen=True, slots=True)
class ByLength:
    """Short requests keep every bit, where little memory is at stake; long ones are coded."""

    kept: str
    coded: str
    bound_tokens: int
    """The longest request that is not coded."""

    def choose(self, length_tokens: int, *, may_code: bool) -> str:
        """Return the kept form for short requests, and for tenants that ask for it."""
        return self.coded if may_code and length_tokens > self.bound_tokens else self.kept
