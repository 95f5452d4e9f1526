"""How a request's pages are stored: from the request and its tenant's setting, never from load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

ANSWER_TOKENS: Final = 512
"""Of an answer, at most so many count: clients that name no maximum ask for all that is left."""


class Controller(Protocol):
    """Chooses among the codecs of an engine."""

    def choose(
        self, prompt_tokens: int, answer_tokens: int, *, may_code: bool, floor: int = 0
    ) -> str:
        """Return a codec's name for a prompt and the longest answer that was asked for.

        `may_code` is its tenant's setting, `floor` how many forms of more bits its tenant's guard
        has stepped back. An answer's bits follow from the choice, so nothing that others do, and
        nothing that happens to be cached, may enter it.
        """


@dataclass(frozen=True, slots=True)
class Fixed:
    """All pages in one form, but for tenants that stepped back."""

    forms: tuple[str, ...]
    """From the fewest bits to the most."""

    def choose(
        self, prompt_tokens: int, answer_tokens: int, *, may_code: bool, floor: int = 0
    ) -> str:
        """Return the first one, or what its tenant stepped back to."""
        return self.forms[min(floor, len(self.forms) - 1)]


@dataclass(frozen=True, slots=True)
class ByLength:
    """Short requests are not coded, where little memory is at stake; long ones are."""

    forms: tuple[str, ...]
    """From the fewest bits to the most; the last one is not coded."""
    bound_tokens: int
    """The longest request that is not coded: its prompt and up to `ANSWER_TOKENS` of answer."""

    def choose(
        self, prompt_tokens: int, answer_tokens: int, *, may_code: bool, floor: int = 0
    ) -> str:
        """Return the kept form for short requests, and for tenants that ask for it."""
        length = prompt_tokens + min(answer_tokens, ANSWER_TOKENS)
        coded = may_code and length > self.bound_tokens
        return self.forms[min(floor, len(self.forms) - 1)] if coded else self.forms[-1]


@dataclass(frozen=True, slots=True)
class ByLink:
    """Prompts that would be too long under way in 16 bits are coded, and so are long requests.

    The link's bandwidth is what an operator has configured, never what is measured: a prompt takes
    the same form on an idle link and on a full one. What a tenant may lose is its own setting.
    """

    otherwise: ByLength
    """What chooses where the link is fast enough."""
    bytes_per_token: float
    """Of pages that are not coded."""
    link_bytes_per_s: float
    wait_s: float
    """What a prompt's pages may take on a link that nothing else uses."""

    @property
    def bound_tokens(self) -> int:
        """Return the longest prompt whose pages take no longer."""
        return int(self.wait_s * self.link_bytes_per_s / self.bytes_per_token)

    def choose(
        self, prompt_tokens: int, answer_tokens: int, *, may_code: bool, floor: int = 0
    ) -> str:
        """Return the coded form for prompts that would be too long under way."""
        if may_code and prompt_tokens > self.bound_tokens:
            forms = self.otherwise.forms
            return forms[min(floor, len(forms) - 1)]
        return self.otherwise.choose(prompt_tokens, answer_tokens, may_code=may_code, floor=floor)
