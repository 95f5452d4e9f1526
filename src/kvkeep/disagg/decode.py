"""The worker that goes on with answers: another's prompt pages are a tier that is being filled."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import numpy as np

from kvkeep.attention.apart import part_pages
from kvkeep.cache.manager import CacheManager
from kvkeep.cache.matching import Match
from kvkeep.cache.radix import KEY_BYTES, token_bytes
from kvkeep.cache.tiers import Copy, Install
from kvkeep.disagg.afar import Afar, AfarPart
from kvkeep.disagg.incoming import Arriving, Incoming
from kvkeep.disagg.incoming_rows import IncomingRows
from kvkeep.disagg.inlet import Inlet
from kvkeep.disagg.options import LinkOptions
from kvkeep.disagg.prompt import PromptPages, below_of
from kvkeep.disagg.side import Side
from kvkeep.disagg.wire import Block, Credit, Drop, Kind
from kvkeep.engine import messages as m
from kvkeep.engine.apart import Part
from kvkeep.engine.api import GenerateRequest
from kvkeep.engine.engine import EngineCore, Output
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.rows import RowsToCome
from kvkeep.engine.sealers import Seal, transfer_seal_of
from kvkeep.sealing import PageSealer, SealContext
from kvkeep.types import PageKind, chain_hash

POLL_BYTES: Final = 64 << 20
"""Copied into the cache in one step, and at least one frame: what one link has on its way at most
by default, so that a long step does not hold it up."""
MOST_ROWS_BYTES: Final = 256 << 20
"""Rows that may wait beside the cache, over all requests; what exceeds it is computed here."""
AGAIN_S: Final = 0.5
"""A worker that did not answer is left alone for so long."""


class DecodeSide(Side):
    """Stands beside a decode engine's loop and is its tier; a `Tier` and a `Beside`."""

    def __init__(
        self,
        engine: EngineOptions,
        options: LinkOptions,
        inbox: m.Inbox,
        clock: Callable[[], float] = time.monotonic,
        seal: Seal = transfer_seal_of,
    ) -> None:
        super().__init__(engine, options, inbox, clock, seal)
        self._numbers = itertools.count(1)
        self.afar = Afar(self._waker.wake)
        self._requests: dict[str, list[tuple[Inlet, Arriving]]] = {}
        self._rows: dict[str, dict[str, IncomingRows]] = {}
        self._names: dict[SealContext, list[tuple[Incoming, int]]] = {}
        self._inlets: dict[str, Inlet] = {}
        self._again_s: dict[str, float] = {}
        self._asking: list[tuple[Inlet, Incoming]] = []
        self._events: deque[tuple[int, Callable[[], None]]] = deque()
        self.installed_pages = 0
        """Whole pages that other workers have computed."""

    @property
    def pending(self) -> int:
        """Return the prompts on their way in, and what is known of them."""
        return len(self._requests) + len(self._names) + len(self._asking) + len(self.afar)

    @property
    def inlets(self) -> list[Inlet]:
        """Return the links there are."""
        return list(self._inlets.values())

    # Beside the loop

    def begin(self, core: EngineCore) -> None:
        """Take note of the engine."""
        self._own, thread = self._open(core)
        thread.start(self._waker.now_and_then(self._options.beat_s, self._may_expire))

    def before(self, command: m.Command) -> None:
        """Note whose pages are to come."""
        match command:
            case m.Wake():
                self._waker.looked()
            case m.Submit(spec) if spec.handover is not None and spec.handover.role == "decode":
                if spec.handover.link:  # none: a prompt that nobody computes elsewhere
                    self._expect(spec, spec.handover.link)
            case m.Begin(request_id, ()):
                self._forget(request_id)  # nobody computes it elsewhere
            case m.Begin(request_id) if (part := self.afar.part_of(request_id)) is not None:
                part.due_s = self._clock() + self._options.answer_s

    def after(self, outputs: Sequence[Output]) -> None:
        """Forget requests that have ended, and what has taken too long."""
        for output in outputs:
            if output.chunk.finish is not None:
                self._forget(output.request_id)
                self.afar.forget(output.request_id)
        now = self._clock()
        self.afar.expire(now)
        for request_id, own in list(self._requests.items()):
            if any(incoming.expires_s <= now for _, incoming in own):
                self._forget(request_id)

    def close(self) -> None:
        """End all links."""
        self._close()

    # Elsewhere

    def part_of(self, spec: GenerateRequest) -> Part | None:
        """Return the part of a request whose first pages stay with its prefill worker."""
        return self.afar.part_of(spec.id)

    def rows_of(self, spec: GenerateRequest) -> Mapping[str, RowsToCome]:
        """Return, by form of its pages, a request's rows that its prefill worker sends."""
        return self._rows.get(spec.id, {})

    # Below the cache

    def holds(self, context: SealContext) -> bool:
        """Tell whether a page is to come."""
        return self._find(context) is not None

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        """Ask for a page, together with the others of its prompt; see `Tier.fetch`."""
        found = self._find(context)
        if found is None:
            done(False)
            return
        incoming, page = found
        incoming.wait(page, install, done)
        of_request = self._requests[incoming.request_id]
        inlet = next(inlet for inlet, one in of_request if one is incoming)
        if (inlet, incoming) not in self._asking:
            self._asking.append((inlet, incoming))

    def store(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        read: Callable[..., object],
        expires_s: float | None,
    ) -> Copy | None:
        """Take nothing."""
        return None

    def forget(self, owner: str) -> int:
        """Return 0: what is on its way is given up with the cache's fetch of it."""
        return 0

    def poll(self) -> None:
        """Ask for what the cache waits for, and install what came, up to a budget."""
        asking, self._asking = self._asking, []
        for inlet, incoming in asking:
            inlet.say(incoming.want())
        budget = POLL_BYTES
        while self._events and budget > 0:
            size, event = self._events.popleft()
            budget -= size
            event()
        if self._events:
            self._waker.wake()

    # Inside

    def _may_expire(self) -> bool:
        return bool(self._requests) or len(self.afar) > 0

    def _expect(self, spec: GenerateRequest, link: str) -> None:
        """Note the names of the pages that the cache lacks of a prompt."""
        if self._core.sharing.stores_nothing(spec.tenant) or not spec.store:
            return
        sealer = self._sealer_of(spec)
        inlet = None if sealer is None else self._inlet(link)
        if sealer is None or inlet is None:
            return
        if (part := self._part(spec, sealer, inlet)) is not None:
            self.afar.add(part)
            return
        self._requests[spec.id] = own = []
        for codec, manager in self._core.caches.managers.items():
            tokens = np.array(spec.prompt_ids, np.int32)
            match = manager.match(tokens, account=spec.tenant, scope=spec.scope)
            pages = self._named(manager, spec, match.tag, sealer)
            arriving: list[Arriving] = []
            if (incoming := self._incoming(spec, manager, match, pages)) is not None:
                arriving.append(incoming)
            if (rows := self._rows_to_come(spec, pages)) is not None:
                arriving.append(rows)
                self._rows.setdefault(spec.id, {})[codec] = rows
            for one in arriving:
                inlet.incoming[one.number] = one
                own.append((inlet, one))
            if rows is not None:  # known here before they can come
                inlet.say(rows.want())

    def _rows_to_come(self, spec: GenerateRequest, pages: PromptPages) -> IncomingRows | None:
        """Return the rows behind a prompt's last whole pages, which are sent beside them.

        None where there are none, or none that can be: of requests whose tokens may be evicted, and
        beyond a bound. None as well where they are computed sooner than they are here.
        """
        length, speeds = len(spec.prompt_ids), self._options.speeds
        kept = (one.size for rows in self._rows.values() for one in rows.values())
        if (
            not pages.open_tokens
            or self._core.watch(spec) is not None
            or sum(kept) + pages.open_bytes > MOST_ROWS_BYTES
            or (speeds is not None and not pages.open_pays(length, speeds))
        ):
            return None
        number, ends_s = next(self._numbers), self._ends_s(spec)
        return IncomingRows(spec.id, number, pages, length, ends_s)

    def _part(self, spec: GenerateRequest, sealer: PageSealer, inlet: Inlet) -> AfarPart | None:
        """Return a long prompt's first pages, to be held elsewhere; None: they come here.

        The prompt's length decides, and what its tenant asked for. Where tokens may be evicted,
        pages come here: only who attends to all of them can tell which.
        """
        least = self._options.attend_apart
        if least is None or len(spec.prompt_ids) < least or self._core.watch(spec) is not None:
            return None
        (manager,) = self._core.caches.managers.values()
        pages = part_pages(len(spec.prompt_ids), manager.pool.spec.block_pages)
        if not pages:
            return None
        tag = manager.match(spec.prompt_ids[:0], account=spec.tenant, scope=spec.scope).tag
        names, ends_s = self._named(manager, spec, tag, sealer), self._ends_s(spec)
        number, answer_s = next(self._numbers), self._options.answer_s
        return AfarPart(spec.id, number, pages, names, inlet, ends_s, answer_s, self._faults)

    def _incoming(
        self, spec: GenerateRequest, manager: CacheManager, match: Match, pages: PromptPages
    ) -> Incoming | None:
        """Return what is to come of a prompt into one cache, its pages named as that names them."""
        known = match.attached()
        if len(known) >= len(pages.hashes):
            return None
        ends_s = self._ends_s(spec)
        incoming = Incoming(spec.id, next(self._numbers), pages, len(known), ends_s)
        last = known[-1].hash if known else manager.index.model_digest
        digest, raw, below = match.tag.digest(), token_bytes(spec.prompt_ids), below_of(manager)
        for page in range(len(known), len(pages.hashes)):
            last = chain_hash(last, digest, raw[page * KEY_BYTES : (page + 1) * KEY_BYTES])
            first = page == 0 and manager.pool.num_first > 0
            kind = PageKind.FIRST if first else PageKind.PLAIN
            name = below.context(spec.tenant, match.tag, last, kind)
            self._names.setdefault(name, []).append((incoming, page))
            incoming.names.append(name)
        return incoming

    def _find(self, context: SealContext) -> tuple[Incoming, int] | None:
        found = self._names.get(context, ())
        return next(((one, page) for one, page in found if one.has(page)), None)

    def _inlet(self, link: str) -> Inlet | None:
        """Return the link to a worker; None while that does not answer."""
        inlet = self._inlets.get(link)
        if inlet is not None and not inlet.closed:
            return inlet
        now = self._clock()
        if self._thread is None or now < self._again_s.get(link, now):
            return None
        self._again_s[link] = now + AGAIN_S
        inlet = Inlet(
            link,
            self._thread,
            self._options,
            self._faults,
            self._arrived,
            self._lost,
            self.afar.hears,
        )
        self._inlets[link] = inlet
        self._thread.start(inlet.run(self._own))
        return inlet

    def _arrived(self, inlet: Inlet, block: Block, layers: list[memoryview], size: int) -> None:
        """Hear of pages, or of rows, which are copied later; on the link's thread."""
        incoming = inlet.incoming.get(block.request)
        rows = incoming is not None and incoming.kind is Kind.OPEN
        install = partial(self._install, inlet, block, layers, size)
        self._events.append((0 if rows else size, install))
        self._waker.wake()

    def _lost(self, inlet: Inlet, number: int | None, page: int) -> None:
        """Hear of pages that do not come; on the link's thread."""
        self.afar.lost(inlet, number)
        self._events.append((0, partial(self._lose, inlet, number, page)))
        self._waker.wake()

    def _install(self, inlet: Inlet, block: Block, layers: list[memoryview], size: int) -> None:
        incoming = inlet.incoming.get(block.request)
        if incoming is not None:
            whole = incoming.arrived(block, layers)
            self.installed_pages += whole
            self._date(incoming, whole)
        inlet.say(Credit(size))

    def _date(self, incoming: Arriving, whole: int) -> None:
        """Note when pages or rows came, and that they are there."""
        moments = self._core.moments(incoming.request_id)
        if moments is None:
            return
        moments.received_s = max(moments.received_s or 0.0, incoming.received_s)
        moments.received_pages += whole
        moments.installed_s = self._clock()
        if incoming.kind is Kind.PAGES:
            moments.received_bytes = incoming.received_bytes
        else:
            moments.received_rows_bytes = incoming.received_bytes

    def _lose(self, inlet: Inlet, number: int | None, page: int) -> None:
        for one in list(inlet.incoming.values()):
            if number is None or one.number == number:
                one.lose(page)

    def _forget(self, request_id: str) -> None:
        """Wait for nothing more of a request, and say so."""
        if (part := self.afar.part_of(request_id)) is not None:
            part.lose()
        self._rows.pop(request_id, None)
        for inlet, incoming in self._requests.pop(request_id, ()):
            if incoming.waits:
                inlet.say(Drop(incoming.number))
            incoming.lose(0)
            inlet.incoming.pop(incoming.number, None)
            self._asking = [one for one in self._asking if one[1] is not incoming]
            for name in incoming.names:
                left = [one for one in self._names[name] if one[0] is not incoming]
                if left:
                    self._names[name] = left
                else:
                    del self._names[name]
