"""What sealing costs beside the raw cipher, and how soon destroyed keys open nothing.

Pages of 1 MiB on one core. The raw cipher is one call of AES-256-GCM into memory made before, and
sealing goes into the same memory, as a tier has some ready: it derives the page's key and
commitment, makes the bytes that the page is bound to, and the frame. The context is a new one for
each page, made before, as a cache makes it to look the page up. Page keys come from this process
there, by the key process's arithmetic; `key_round_trip_us` is what asking the real one adds to a
page, on the threads that seal and open.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench import harness
from bench.harness import MIN_PAIRS, Cell, Figure, Goal, Options, Row, estimate, interleave
from kvkeep.errors import KeysGone
from kvkeep.sealing import SealContext
from kvkeep.shield import envelope
from kvkeep.shield.cipher import FrameSealer, PageKey, Pages
from kvkeep.shield.frame import Suite
from kvkeep.shield.keys import KeyClient
from kvkeep.shield.opened import opened
from kvkeep.shield.providers.local import make_key_file
from kvkeep.shield.providers.provider import parse_spec
from kvkeep.types import PageTag

PAGE_BYTES: Final = 1 << 20
LAYERS: Final = (32, 4, 128)
"""Of a page of 1 MiB; figures are of the first."""
SERVERS: Final = 3
"""That share a key store where a tenant is shredded."""


class OwnKeys:
    """Page keys from this process: the key process's arithmetic without the process."""

    def __init__(self) -> None:
        self._epoch_key = os.urandom(32)

    def name_key(self, owner: str) -> bytes | None:
        """One key for all names."""
        return bytes(32)

    def shelf_key(self) -> bytes | None:
        """One key for all shelves."""
        return bytes(32)

    def fresh(self, owner: str, page_id: bytes) -> PageKey:
        """The key of a page to be sealed."""
        return self._made(1, page_id, 0)

    def known(self, owner: str, epoch: int, pages: Pages) -> list[PageKey]:
        """The keys of pages that were sealed."""
        return [self._made(epoch, *page) for page in pages]

    def _made(self, epoch: int, page_id: bytes, generation: int) -> PageKey:
        material = envelope.page_material(self._epoch_key, page_id, generation)
        return PageKey(epoch, memoryview(bytearray(material)))


def context(owner: str) -> SealContext:
    """What a page of an owner is bound to."""
    return SealContext(owner, PageTag(owner), b"h" * 32, b"m" * 32, b"s" * 16)


Sizes = tuple[int, ...]
Call = Callable[[SealContext], object]
"""What is measured, for a page that is bound to this."""


def gb_per_s(call: Call, calls: int) -> float:
    """Return the GB/s of a call over a page."""
    contexts = [context("acme") for _ in range(calls)]
    begun = time.perf_counter()
    for bound in contexts:
        call(bound)
    return PAGE_BYTES * calls / (time.perf_counter() - begun) / 1e9


def compared(ours: Call, raw: Call, options: Options) -> list[harness.Pair]:
    """Measure a call beside the raw cipher, in turn."""
    calls = 20 if options.quick else 100
    ours(context("acme"))
    raw(context("acme"))
    pairs = MIN_PAIRS if options.quick else 4 * MIN_PAIRS
    return interleave(lambda: gb_per_s(ours, calls), lambda: gb_per_s(raw, calls), pairs)


def speeds(options: Options) -> tuple[list[Figure], list[Row]]:
    """Measure sealing and opening beside the raw cipher."""
    raw, page = AESGCM(os.urandom(32)), os.urandom(PAGE_BYTES)
    nonce, bound = os.urandom(12), bytes(96)
    coded, back = memoryview(bytearray(PAGE_BYTES + 16)), memoryview(bytearray(PAGE_BYTES))
    raw.encrypt_into(nonce, page, bound, coded)
    sealer = FrameSealer(OwnKeys(), Suite.AES_256_GCM)
    found: list[Figure] = []
    rows: list[Row] = []
    for layers in LAYERS:
        sizes = (PAGE_BYTES // layers,) * layers
        frame = sealer.seal(context("acme"), page, sizes)
        room = memoryview(bytearray(len(frame)))

        def sealing(one: SealContext, sizes: Sizes = sizes, room: memoryview = room) -> None:
            sealer.seal(one, page, sizes, room)

        def raw_sealing(_: SealContext, room: memoryview = room) -> None:
            raw.encrypt_into(nonce, page, bound, room[: PAGE_BYTES + 16])

        def opening(one: SealContext, sizes: Sizes = sizes, frame: memoryview = frame) -> None:
            for _ in sealer.open(one, frame, sizes, back):
                pass

        def raw_opening(_: SealContext) -> None:
            raw.decrypt_into(nonce, coded, bound, back)

        sides: dict[str, tuple[Call, Call]] = {
            "seal": (sealing, raw_sealing),
            "open": (opening, raw_opening),
        }
        for name, (ours, theirs) in sides.items():
            pairs = compared(ours, theirs, options)
            ratio, speed = harness.ratio(pairs), estimate([pair.ours for pair in pairs])
            row: dict[str, Cell] = {"what": name, "layers": layers, "ratio": ratio.median}
            rows.append(
                row | {"gb_per_s": speed.median, "raw": estimate([p.theirs for p in pairs]).median}
            )
            if layers == LAYERS[0]:
                found.append(Figure(f"{name}_ratio", ratio, Goal(">=", 0.85)))
                found.append(Figure(f"{name}_gb_per_s", speed))
    return found, rows


@contextmanager
def servers(folder: Path, count: int) -> Iterator[list[KeyClient]]:
    """Run so many servers' key processes over one store."""
    make_key_file(folder / "kek")
    spec = f"file:{folder / 'kek'}"
    with ExitStack() as stack:
        clients = [KeyClient(spec, str(folder / "sealing.json")) for _ in range(count)]
        for client in clients:
            client.start()
            stack.callback(client.close)
        yield clients


def round_trips(client: KeyClient, options: Options) -> Figure:
    """Measure what asking the key process for a page's key takes."""
    client.fresh("acme", os.urandom(16)).wipe()
    taken = []
    for _ in range(200 if options.quick else 2_000):
        begun = time.perf_counter()
        client.fresh("acme", os.urandom(16)).wipe()
        taken.append((time.perf_counter() - begun) * 1e6)
    return Figure("key_round_trip_us", estimate(taken))


def shredding(folder: Path, clients: Sequence[KeyClient], options: Options) -> Figure:
    """Measure from the operator's command until no server opens a page of the tenant."""
    taken = []
    for number in range(MIN_PAIRS if options.quick else 3 * MIN_PAIRS):
        tenant = f"tenant{number}"
        page_id = os.urandom(16)
        epoch = clients[0].fresh(tenant, page_id).epoch
        for client in clients:
            client.known(tenant, epoch, [(page_id, 0)])[0].wipe()
        begun = time.perf_counter()
        with opened(folder / "sealing.json", parse_spec(f"file:{folder / 'kek'}")) as store:
            store.shred(tenant)
        for client in clients:
            while opens(client, tenant, epoch, page_id):
                time.sleep(0.001)
        taken.append(time.perf_counter() - begun)
    return Figure("shred_s", estimate(taken), Goal("<=", 60.0))


def opens(client: KeyClient, tenant: str, epoch: int, page_id: bytes) -> bool:
    """Tell whether a server still gets a page's key."""
    try:
        client.known(tenant, epoch, [(page_id, 0)])[0].wipe()
    except KeysGone:
        return False
    return True


def figures(options: Options) -> tuple[list[Figure], list[Row]]:
    """Measure it all."""
    found, rows = speeds(options)
    with TemporaryDirectory() as name, servers(Path(name), SERVERS) as clients:
        found.append(round_trips(clients[0], options))
        found.append(shredding(Path(name), clients, options))
    return found, rows
