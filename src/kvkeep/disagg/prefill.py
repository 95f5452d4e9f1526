"""The worker that computes prompts: it sends their pages, layer by layer, to whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from kvkeep.cache.manager import CacheManager
from kvkeep.cache.tiers import ClosedPage, Copy, Install, OpenRows
from kvkeep.disagg.connector import Channel, Connector
from kvkeep.disagg.keeper import Asked, Keeper
from kvkeep.disagg.link import connector_of
from kvkeep.disagg.options import LinkOptions
from kvkeep.disagg.outgoing import Outgoing
from kvkeep.disagg.outgoing_rows import OutgoingRows, RowsWish
from kvkeep.disagg.outlet import Event, Outlet
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.side import Side
from kvkeep.disagg.wire import Drop, Frame, Hold, Lost, Want, WantRows
from kvkeep.engine import messages as m
from kvkeep.engine.api import GenerateRequest
from kvkeep.engine.engine import EngineCore, Output
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import Seal, transfer_seal_of
from kvkeep.sealing import SealContext

EARLY_S: Final = 10.0
"""A wish without its prompt is forgotten after so long."""
MOST_EARLY: Final = 1024
"""So many wait for their prompts; whoever wishes for more is told that they are lost."""


class PrefillSide(Side):
    """Stands beside a prefill engine's loop and hears of the layers its steps close."""

    def __init__(
        self,
        engine: EngineOptions,
        options: LinkOptions,
        inbox: m.Inbox,
        clock: Callable[[], float] = time.monotonic,
        seal: Seal = transfer_seal_of,
    ) -> None:
        super().__init__(engine, options, inbox, clock, seal)
        self._events: deque[tuple[Outlet, Event]] = deque()
        self._specs: OrderedDict[str, tuple[GenerateRequest, float | None]] = OrderedDict()
        """By request: its prompt, and when it is forgotten once it has ended."""
        self._early: list[tuple[Outlet, Want | WantRows | Hold, float]] = []
        self._going: dict[str, Outgoing] = {}
        self._rows = OutgoingRows()
        self._connector: Connector | None = None
        self.keeper = Keeper(self._faults)
        self.outlets: list[Outlet] = []
        self.address = ""
        """What is listened at."""

    @property
    def pending(self) -> int:
        """Return the prompts on their way out."""
        return len(self._going) + len(self._rows) + len(self.keeper)

    # Beside the loop

    def begin(self, core: EngineCore) -> None:
        """Listen; raises `ConfigError` where that can't or must not be done."""
        own, thread = self._open(core)
        options = self._options
        if options.attend_apart is not None:
            self.keeper.begin(core, self._engine)
        self._connector = connector_of(options, options.listen)

        async def accepted(channel: Channel) -> None:
            outlet = Outlet(channel, thread, options, self._faults, self._heard, self._room)
            self.outlets.append(outlet)
            with contextlib.suppress(asyncio.CancelledError):  # the thread's end is no error
                await outlet.serve(own)

        self.address = thread.wait(self._connector.listen(options.listen, accepted))
        core.info = msgspec.structs.replace(core.info, link=options.advertise or self.address)
        thread.start(self._waker.now_and_then(options.beat_s, self._may_expire))

    def before(self, command: m.Command) -> None:
        """Note the prompts that are to be handed over."""
        match command:
            case m.Wake():
                self._waker.looked()
            case m.Submit(spec) if spec.handover is not None and spec.handover.role == "prefill":
                self._specs[spec.id] = (spec, None)
                early, self._early = self._early, []
                for outlet, want, expires_s in early:
                    self._ask(outlet, want, expires_s)
            case m.Cancel(request_id):
                self._specs.pop(request_id, None)
                self._give_up(request_id)
            case m.SetTenants(shares):
                self._rows.forget(lambda spec: spec.tenant not in shares)
                self.keeper.end_where(lambda one: one.spec.tenant not in shares, say=True)
            case m.Purge(tenant):
                self._rows.forget(lambda spec: spec.tenant == tenant)
                for request_id, going in list(self._going.items()):
                    if going.spec.tenant == tenant:
                        self._give_up(request_id)
                self.keeper.end_where(lambda one: one.spec.tenant == tenant, say=True)

    def after(self, outputs: Sequence[Output]) -> None:
        """Take in what askers said, and send what has closed or lies in the cache."""
        now = self._clock()
        for output in outputs:
            known = self._specs.get(output.request_id)
            if output.chunk.finish is None or known is None:
                continue
            self._specs[output.request_id] = (known[0], now + self._options.unasked_s)
            self.keeper.computed(output.request_id)
            self._rows.computed(output.request_id, now + EARLY_S)
            if (going := self._going.get(output.request_id)) is not None:
                going.hold(ended=True)
        self._hear()
        self._expire(now)
        self._rows.pump(now)
        for request_id, going in list(self._going.items()):
            if going.waits:
                continue
            going.pump()
            going.flush()
            missing = going.missing()
            if missing is not None:
                going.outlet.put(Lost(going.want.request, missing))
            if going.done or missing is not None:
                self._end(request_id)

    def close(self) -> None:
        """End all links."""
        for request_id in list(self._going):
            self._end(request_id)
        self.keeper.close()
        self._close(self._listen_no_more)

    # In a step

    def layer_closed(self, page: ClosedPage, layer: int) -> None:
        """Take a layer of a page for whoever waits for it, or has asked since the step began."""
        self._hear()
        going = self._going.get(page.request_id)
        if going is not None and not going.waits:
            going.closed(page, layer)

    def rows_stored(self, rows: OpenRows, layer: int, data: bytes) -> None:
        """Take a layer of a prompt's last rows for whoever asks for them."""
        self._hear()
        known = self._specs.get(rows.request_id)
        if known is not None and (layer or self._pays(known[0], rows)):
            self._rows.stored(known[0], rows, layer, data)

    # Inside

    def _hear(self) -> None:
        """Take in what askers have said: a prompt's first step begins before anyone can ask."""
        while self._events:
            self._take_in(*self._events.popleft(), self._clock())

    def _heard(self, outlet: Outlet, event: Event) -> None:
        """Hear of an asker; on the link's thread."""
        if isinstance(event, Frame):
            self.keeper.rows(outlet, event)
            return
        if event is None and outlet in self.outlets:
            self.outlets.remove(outlet)
        self._events.append((outlet, event))
        self._waker.wake()

    def _listen_no_more(self) -> None:
        if self._connector is not None:
            self._connector.close()

    def _may_expire(self) -> bool:
        return bool(self._going or self._early or len(self._rows) or len(self.keeper))

    def _room(self) -> None:
        """Hear that a queue has room again; on the link's thread."""
        if self._going or len(self._rows):
            self._waker.wake()

    def _take_in(self, outlet: Outlet, event: Event, now: float) -> None:
        match event:
            case Want() | WantRows() | Hold():
                self._ask(outlet, event, now + EARLY_S)
            case Drop(request):
                self._rows.end_where(lambda one: one.is_of(outlet, request))
                outlet.drop(request)
                early = self._early
                self._early = [e for e in early if e[0] is not outlet or e[1].request != request]
                self.keeper.end_where(
                    lambda one: one.outlet is outlet and one.record.request == request
                )
                for request_id, going in list(self._going.items()):
                    if going.outlet is outlet and going.want.request == request:
                        self._end(request_id)
            case None:
                self._rows.end_where(lambda one: one.outlet is outlet)
                self.keeper.end_where(lambda one: one.outlet is outlet)
                for request_id, going in list(self._going.items()):
                    if going.outlet is outlet:
                        self._end(request_id)

    def _ask(self, outlet: Outlet, want: Want | WantRows | Hold, expires_s: float) -> None:
        """Begin to send what was asked for; a wish that comes before its prompt waits for it."""
        spec, forgotten_s = self._specs.get(want.id, (None, None))
        if spec is None:
            if len(self._early) < MOST_EARLY:
                self._early.append((outlet, want, expires_s))
            else:
                outlet.put(Lost(want.request, 0))
            return
        if isinstance(want, Hold):
            self._keep(outlet, want, spec, ended=forgotten_s is not None)
            return
        if isinstance(want, WantRows):
            self._ask_rows(outlet, want, spec, ended=forgotten_s is not None)
            return
        going = self._going_of(outlet, want, spec)
        if going is None or want.id in self._going:
            outlet.put(Lost(want.request, want.first_page))
            return
        self._going[want.id] = going
        going.hold(ended=forgotten_s is not None)

    def _ask_rows(
        self, outlet: Outlet, want: WantRows, spec: GenerateRequest, *, ended: bool
    ) -> None:
        """Begin to send a prompt's last rows where both sides mean the same prompt."""
        _, pages = self._pages_of(want.tag, spec)
        if pages is None or pages.chain(pages.open_page) != want.chain:
            outlet.put(Lost(want.request, 0))
        else:
            wish = RowsWish(outlet, want, spec, pages, self._ends_s(spec))
            self._rows.ask(wish, ended=ended)

    def _pays(self, spec: GenerateRequest, rows: OpenRows) -> bool:
        """Tell whether anyone asks for such rows: both sides are told the same speeds."""
        if self._options.speeds is None:
            return True
        _, pages = self._pages_of(rows.tag.digest(), spec)
        return pages is not None and pages.open_pays(len(spec.prompt_ids), self._options.speeds)

    def _keep(self, outlet: Outlet, hold: Hold, spec: GenerateRequest, *, ended: bool) -> None:
        """Hold a request's first pages where both sides mean the same ones, and nothing else."""
        manager, pages = self._pages_of(hold.tag, spec)
        if (
            self._options.attend_apart is None
            or manager is None
            or pages is None
            or hold.pages > len(pages.hashes)
            or pages.chain(hold.pages) != hold.chain
        ):
            outlet.put(Lost(hold.request, 0))
        else:
            asked = Asked(outlet, hold, spec, manager, pages, self._ends_s(spec))
            self.keeper.ask(asked, ended=ended)

    def _going_of(self, outlet: Outlet, want: Want, spec: GenerateRequest) -> Outgoing | None:
        """Return what is to be sent; None where the two sides' pages are not the same ones."""
        manager, pages = self._pages_of(want.tag, spec)
        if manager is None or pages is None:
            return None
        inside = want.first_page < want.end_page <= len(pages.hashes)
        if not inside or pages.chain(want.first_page) != want.chain:
            return None
        return Outgoing(want, spec, manager, pages, outlet, self._ends_s(spec))

    def _pages_of(
        self, tag_digest: bytes, spec: GenerateRequest
    ) -> tuple[CacheManager | None, PromptPages | None]:
        """Return the cache whose pages have the tag asked for, and the prompt's names in it."""
        for manager in self._core.caches.managers.values():
            tag = manager.match(spec.prompt_ids[:0], account=spec.tenant, scope=spec.scope).tag
            if tag.digest() == tag_digest:
                sealer = self._sealer_of(spec)
                known = None if sealer is None else self._named(manager, spec, tag, sealer)
                return manager, known
        return None, None

    def _expire(self, now: float) -> None:
        for request_id, going in list(self._going.items()):
            if going.expires_s <= now:
                self._give_up(request_id)
        self._rows.end_where(lambda one: one.expires_s <= now)
        self.keeper.end_where(lambda one: one.expires_s <= now, say=True)
        early = self._early
        self._early = [one for one in early if one[2] > now and not one[0].closed]
        for outlet, want, expires_s in early:
            if expires_s <= now:
                outlet.put(Lost(want.request, want.first_page if isinstance(want, Want) else 0))
        while self._specs:
            request_id, (_, forgotten_s) = next(iter(self._specs.items()))
            if forgotten_s is None or forgotten_s > now:
                break
            del self._specs[request_id]

    def _give_up(self, request_id: str) -> None:
        """Send nothing more of a prompt, and say so."""
        self._rows.forget(lambda spec: spec.id == request_id)
        self.keeper.end_where(lambda one: one.spec.id == request_id, say=True)
        going = self._going.get(request_id)
        if going is not None:
            going.outlet.drop(going.want.request)
            going.outlet.put(Lost(going.want.request, going.want.first_page))
            self._end(request_id)

    def _end(self, request_id: str) -> None:
        self._going.pop(request_id).release()


class NothingBelow:
    """A `Tier` that holds nothing: it is there so that pages have names outside memory."""

    def holds(self, context: SealContext) -> bool:
        """Return False."""
        return False

    def fetch(
        self,
        context: SealContext,
        layer_bytes: Sequence[int],
        install: Install,
        done: Callable[[bool], None],
    ) -> None:
        """Fetch nothing."""
        done(False)

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
        """Return 0."""
        return 0

    def poll(self) -> None:
        """Nothing is due."""
