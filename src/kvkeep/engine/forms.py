"""How each request's pages are stored: the controller's choice, and its tenant's guard."""

from __future__ import annotations

from collections.abc import Callable

from kvkeep.cache.caches import Caches
from kvkeep.engine import messages as m
from kvkeep.engine.api import GenerateRequest
from kvkeep.engine.choosing import controller_of
from kvkeep.engine.guard import Guard, Ticket, guard_of
from kvkeep.engine.led_guard import LedGuard
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sequence import Request
from kvkeep.errors import ConfigError
from kvkeep.quant.controller import ANSWER_TOKENS, Controller
from kvkeep.types import PAGE_TOKENS


class Forms:
    """Says what a request could take at once, and what it does once its tenant's floor is known."""

    def __init__(
        self,
        controller: Controller,
        guard: Guard | LedGuard,
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
        drifts = evicts or self.least(spec) != self.guard.form
        answer = _answer(spec)
        length = len(spec.prompt_ids) + answer
        fits = self._caches.of(self.guard.form).fits(spec.tenant, _pages(length))
        can = fits and not spec.params.use_beam_search
        if isinstance(self.guard, LedGuard):
            return self.guard.enter(spec, length, max(1, answer), can=drifts and can)
        if not drifts:
            return Ticket(0, None)
        return self.guard.enter(spec.tenant, length, max(1, answer), can=can)

    def settle(self, request: Request) -> bool:
        """Fix a request's form; False where what decides it is still running."""
        if request.settled:
            return True
        spec = request.spec
        floor = self._floor(request)
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

    def wake(self) -> None:
        """Sample from now on: what comes is clients'."""
        if isinstance(self.guard, Guard):
            self.guard.asleep = False

    def verdicts(self) -> list[m.Verdict]:
        """Return what samples have said since the last call that somebody else has asked for."""
        return self.guard.take() if isinstance(self.guard, LedGuard) else []

    def _floor(self, request: Request) -> int | None:
        if isinstance(self.guard, LedGuard):
            return self.guard.floor(request.spec)
        return self.guard.floor(request.spec.tenant, request.epoch)

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


def forms_of(
    options: EngineOptions, caches: Caches, may_code: Callable[[str], bool], *, evicts: bool
) -> Forms:
    """Return what chooses between the forms that there is memory for; raises `ConfigError`."""
    names = tuple(caches.managers)
    if options.guard_share and len(names) == 1 and not evicts:
        raise ConfigError(
            f"guard_share: pages of kv = {options.kv} are stored as they were computed, and nothing"
            " can drift; choose another kv, let tokens be evicted, or leave it at 0"
        )
    controller = controller_of(options, names, caches.of(names[-1]).pool.spec.bytes_per_token)
    led = options.guard_led
    guard = LedGuard(names[-1]) if led else guard_of(options, names[-1], len(names) - 1 + evicts)
    return Forms(controller, guard, caches, may_code, evicts=evicts)


def _answer(spec: GenerateRequest) -> int:
    return min(spec.params.max_tokens, ANSWER_TOKENS)


def _pages(tokens: int) -> int:
    return tokens // PAGE_TOKENS + 1
