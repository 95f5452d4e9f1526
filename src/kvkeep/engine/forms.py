"""How each request's pages are stored: the controller's choice, and its tenant's guard."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvkeep.cache.caches import Caches
from kvkeep.engine.api import GenerateRequest
from kvkeep.engine.guard import Guard, Ticket
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sequence import Request
from kvkeep.errors import ConfigError
from kvkeep.quant.controller import ANSWER_TOKENS, ByLength, ByLink, Controller, Fixed
from kvkeep.types import PAGE_TOKENS

log = logging.getLogger(__name__)


def controller_of(
    options: EngineOptions, names: tuple[str, ...], bytes_per_token: float
) -> Controller:
    """Return what chooses among forms; `bytes_per_token`: of those that are not coded."""
    link = options.kv_auto_link_bytes_per_s
    if options.kv != "auto":
        if link is not None:
            raise ConfigError("kv_auto_link_bytes_per_s: only kv = auto chooses by it; set that")
        return Fixed(names)
    by_length = ByLength(names, options.kv_auto_tokens)
    if link is None:
        return by_length
    if link <= 0 or options.kv_auto_link_wait_s < 0:
        raise ConfigError(
            f"kv_auto_link_bytes_per_s: {link:g} with kv_auto_link_wait_s ="
            f" {options.kv_auto_link_wait_s:g}; the first must be above 0, the other not below"
        )
    by_link = ByLink(by_length, bytes_per_token, link, options.kv_auto_link_wait_s)
    log.info(
        "kv auto: prompts of more than %d tokens are coded: in 16 bits they would take longer than"
        " %g s on the link",
        by_link.bound_tokens,
        by_link.wait_s,
    )
    return by_link


class Forms:
    """Says what a request could take at once, and what it does once its tenant's floor is known."""

    def __init__(
        self,
        controller: Controller,
        guard: Guard,
        caches: Caches,
        may_code: Callable[[str], bool],
        *,
        evicts: bool = False,
    ) -> None:
        """`may_code` is a tenant's own setting; `evicts`: the first step back ends eviction."""
        self.guard = guard
        self._evicts = evicts
        self._controller = controller
        self._caches = caches
        self._may_code = may_code

    def least(self, spec: GenerateRequest) -> str:
        """Return the form of a tenant that has not stepped back."""
        return self._chosen(spec, 0)

    def enter(self, spec: GenerateRequest, *, evicts: bool = False) -> Ticket:
        """Give a request its place in its tenant's history, once, as it is submitted.

        `evicts`: tokens of it may be. What cannot drift is no part of it; a search, whose beams
        change places, has no shadow.
        """
        if not evicts and self.least(spec) == self.guard.form:
            return Ticket(0, None)
        answer = _answer(spec)
        length = len(spec.prompt_ids) + answer
        fits = self._caches.of(self.guard.form).fits(spec.tenant, _pages(length))
        can = fits and not spec.params.use_beam_search
        return self.guard.enter(spec.tenant, length, max(1, answer), can=can)

    def settle(self, request: Request) -> bool:
        """Fix a request's form; False where what decides it is still running."""
        if request.settled:
            return True
        spec = request.spec
        floor = self.guard.floor(spec.tenant, request.epoch)
        if floor is None:
            return False
        if self._evicts and floor:
            request.watch, floor = None, floor - 1
        request.codec = self._fitting(spec, floor)
        request.settled = True
        same = request.sample is not None and request.codec == request.sample.form
        if request.sample is not None and same and request.watch is None:
            request.sample.over = True
        return True

    def _fitting(self, spec: GenerateRequest, floor: int) -> str:
        """Return the form with the most bits up to the floor's that the tenant's share holds."""
        pages = _pages(len(spec.prompt_ids) + _answer(spec))
        forms = (self._chosen(spec, steps) for steps in range(floor, 0, -1))
        fitting = (form for form in forms if self._caches.of(form).fits(spec.tenant, pages))
        return next(fitting, self.least(spec))

    def _chosen(self, spec: GenerateRequest, floor: int) -> str:
        return self._controller.choose(
            len(spec.prompt_ids),
            spec.params.max_tokens,
            may_code=self._may_code(spec.tenant),
            floor=floor,
        )


def _answer(spec: GenerateRequest) -> int:
    return min(spec.params.max_tokens, ANSWER_TOKENS)


def _pages(tokens: int) -> int:
    return tokens // PAGE_TOKENS + 1
