"""Other ways to send 16-bit pages: coded for the link alone, and widened again on arrival.

A worker of `kvkeep bench disagg` sends each request's pages in the form that its tenant's name
begins with. Coding and widening happen on the links' threads, beside the steps. KVQuant's levels
and CacheGen's tables are learnt on normal numbers: bytes and times are theirs, what is answered is
not looked at. Codes are torch's and numpy's work here: other programs' may be faster.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Final

import numpy as np
import torch

from bench.disagg_coder import Interleaved
from bench.harness import Row
from bench.made_up import kv_shape
from kvkeep.disagg.options import LinkOptions, Role
from kvkeep.disagg.worker import run_worker
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import Seal, TransferSeal
from kvkeep.ops.layout import float_tile_bytes
from kvkeep.quant.baselines.base import KV, Baseline
from kvkeep.quant.baselines.fp8 import Fp8
from kvkeep.quant.baselines.kvquant import KvQuant
from kvkeep.quant.codec import Codec, Float, KVShape, Place, pack_float_tiles, unpack_float_tiles
from kvkeep.quant.hack import Hack
from kvkeep.sealing import Opened, SealContext
from kvkeep.shield.plain import PlainSealer
from kvkeep.types import PAGE_TOKENS, Layout

LIKE: Final = "qwen3-0.6b"
_PLACE: Final = Place(1, first=False)
"""What every page is coded as; what is learnt is the same for all layers."""
_LENGTH: Final = struct.Struct("<I")
_SAMPLE_PAGES: Final = 2
_COUNTED: Final = 2
"""Tables of a range coder are made for so many layers: all have the same ones."""


def normal_page(shape: KVShape, seed: int = 0) -> KV:
    """Return k, v [N, S, D] of normal numbers in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    size = (shape.num_kv_heads, PAGE_TOKENS, shape.head_dim)
    k, v = (torch.randn(size, generator=draw).bfloat16() for _ in range(2))
    return k, v


def _sample(shape: KVShape) -> list[list[KV]]:
    return [[normal_page(shape, seed) for seed in range(_SAMPLE_PAGES)]] * _COUNTED


FORMS: Final[Mapping[str, Callable[[KVShape], Baseline]]] = {
    "fp8": lambda _: Fp8(),
    "kvquant": lambda shape: KvQuant(_sample(shape)),
    "cachegen": lambda shape: Interleaved(_sample(shape)),
}
"""Those that workers can be asked for."""


class FormSealer:
    """A `PageSealer` without secrets that codes the pages of some tenants while they travel.

    Rows behind the last whole pages go in 16 bits, as ours do.
    """

    name = "off"

    def __init__(self, shape: KVShape) -> None:
        self._shape = shape
        self._plain = PlainSealer()
        self._made: dict[str, Baseline] = {}

    def name_of(self, context: SealContext) -> bytes | None:
        """Return the plain sealer's name."""
        return self._plain.name_of(context)

    def shelf_of(self, owner: str) -> bytes | None:
        """Return the plain sealer's shelf."""
        return self._plain.shelf_of(owner)

    def frame_bytes(self, layer_bytes: Sequence[int]) -> int:
        """Return the plain sealer's length: that of coded pages is known once they are coded."""
        return self._plain.frame_bytes(layer_bytes)

    def seal(
        self,
        context: SealContext,
        page: bytes | memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> memoryview:
        """Return a frame of what the tenant's form makes of each layer of each page."""
        form = self._form(context.owner, layer_bytes)
        if form is None:
            return self._plain.seal(context, page, layer_bytes, into)
        whole = np.frombuffer(bytearray(page), np.uint8)
        coded = []
        for end, size in zip(accumulate(layer_bytes), layer_bytes, strict=True):
            tiles = whole[end - size : end].reshape(self._shape.num_kv_heads, -1)
            coded.append(form.encode(*unpack_float_tiles(tiles, self._shape), _PLACE))
        body = b"".join(_LENGTH.pack(len(one)) + one for one in coded)
        return self._plain.seal(context, body, (len(body),), into)

    def open(
        self,
        context: SealContext,
        frame: memoryview,
        layer_bytes: Sequence[int],
        into: memoryview | None = None,
    ) -> Opened:
        """Yield the layers as 16-bit tiles."""
        form = self._form(context.owner, layer_bytes)
        if form is None:
            return (yield from self._plain.open(context, frame, layer_bytes, into))
        size = len(frame) - self._plain.frame_bytes(()) - _LENGTH.size
        (body,) = self._plain.open(context, frame, (max(0, size),))
        at = 0
        for _ in layer_bytes:
            (length,) = _LENGTH.unpack_from(body, at)
            at += _LENGTH.size + length
            k, v = form.decode(bytes(body[at - length : at]), self._shape, _PLACE)
            tiles = pack_float_tiles(k.bfloat16(), v.bfloat16(), Layout.BF16)
            yield memoryview(tiles.tobytes())
        return False

    def _form(self, owner: str, layer_bytes: Sequence[int]) -> Baseline | None:
        name, shape = owner.partition(".")[0], self._shape
        page = shape.num_kv_heads * float_tile_bytes(shape.layout, shape.head_dim)
        if any(size != page for size in layer_bytes):
            return None
        if name in FORMS and name not in self._made:
            self._made[name] = FORMS[name](self._shape)
        return self._made.get(name)


def _seals(engine: EngineOptions) -> TransferSeal:
    del engine
    sealer = FormSealer(kv_shape(LIKE))
    return TransferSeal(sealer.name, lambda _: sealer)


def _seal() -> Seal:
    return _seals


def run_forms(role: Role, engine: EngineOptions, link: LinkOptions, pipe: Connection) -> None:
    """Be a worker that sends pages in its tenants' forms."""
    run_worker(role, engine, link, pipe, _seal)


def cost_rows(turns: int) -> list[Row]:
    """Return what each form makes of a page, and what coding and widening take on one thread."""
    shape = kv_shape(LIKE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_cost_row("bf16", Float(), shape, turns)]
        rows.append(_cost_row("k2v2", Hack(Layout.K2V2), shape, turns))
        made = {name: make(shape) for name, make in FORMS.items()}
        return rows + [_baseline_row(name, one, shape, turns) for name, one in made.items()]
    finally:
        torch.set_num_threads(threads)


def _cost_row(name: str, codec: Codec, shape: KVShape, turns: int) -> Row:
    """Return a row of a form that is attended to as it comes: nothing is widened."""
    k, v = normal_page(shape)
    encode = _median_s(lambda: codec.encode(k, v, _PLACE), turns) if name != "bf16" else 0.0
    size = codec.encode(k, v, _PLACE).nbytes
    return _told(name, shape, size, encode, 0.0)


def _baseline_row(name: str, form: Baseline, shape: KVShape, turns: int) -> Row:
    k, v = normal_page(shape)
    blob = form.encode(k, v, _PLACE)
    encode = _median_s(lambda: form.encode(k, v, _PLACE), turns)
    decode = _median_s(lambda: form.decode(blob, shape, _PLACE), turns)
    return _told(name, shape, len(blob), encode, decode)


def _told(name: str, shape: KVShape, size: int, encode_s: float, decode_s: float) -> Row:
    per_token = shape.num_layers / PAGE_TOKENS
    return {
        "part": "costs",
        "form": name,
        "bytes_per_token": size * per_token,
        "encode_us_per_token": encode_s * per_token * 1e6,
        "widen_us_per_token": decode_s * per_token * 1e6,
    }


def _median_s(work: Callable[[], object], turns: int) -> float:
    took = []
    for _ in range(turns):
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter() - begun)
    return float(np.median(took))
