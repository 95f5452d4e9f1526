"""What each idea of coded pages is worth by itself: in attention's error, and in its time.

Errors are of attention on queries, keys and values that the demo model computed: the outputs of
each context's last rows, in float64, over what comes back of the codes. In all forms the first 128
tokens and the last ones stay as they are. Times are of decoding rows, both sides of a ratio in the
same language: our kernels on packed codes, or torch on the published form (`quant_paper`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal, NamedTuple

import numpy as np
import torch

from bench.harness import MIN_PAIRS, Estimate, Figure, Options, Report, Row, estimate
from bench.quality_run import Asked, Machine, greedy
from bench.quality_suite import Maker, read
from bench.quant_pages import KV_HEADS, ns_per_token, pages_of
from bench.quant_paper import paper_step
from kvkeep.config import DEMO_MODEL
from kvkeep.ops.cpu_attention import CpuAttention
from kvkeep.ops.layout import Attended, AttentionOps, AttentionPlan, LayerKV, Observe
from kvkeep.quant.codec import Float, Place
from kvkeep.quant.hack import Affine, Hack, affine, fitted, hadamard, quantise
from kvkeep.types import PAGE_TOKENS, Int32Array, Layout

SPAN: Final = 128
"""Coded ranges begin and end at multiples of the largest page; the first is left as it is."""
ROWS: Final = 64
"""Queries of a context."""
PARTITION: Final = 64
DIM: Final = 128
GROUP: Final = 2
GROUPS: Final = (1, 2, 7)
CONTEXTS: Final = (1024, 16384)
SUMS: Final = "summation elimination"
REQUANTISING: Final = "requantisation elimination"


class Heads(NamedTuple):
    """What a layer computed of a context: q [T, Hq, D]; k, v [Hkv, T, D]; float32."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Tap:
    """Attention as ever that keeps what it is given, per layer."""

    def __init__(self, inner: AttentionOps) -> None:
        self._inner = inner
        self._kept: dict[int, tuple[list[torch.Tensor], ...]] = {}

    @property
    def bytes_read(self) -> int:
        """Return what was read so far."""
        return self._inner.bytes_read

    def taken(self) -> list[Heads]:
        """Return what was kept since the last call, layer by layer, and forget it."""
        found = [
            Heads(torch.cat(q), torch.cat(k).transpose(0, 1), torch.cat(v).transpose(0, 1))
            for _, (q, k, v) in sorted(self._kept.items())
        ]
        self._kept.clear()
        return found

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        """Keep the rows and write them."""
        for kept, rows in zip(self._of(kv)[1:], (k, v), strict=True):
            kept.append(rows.float())
        self._inner.append(kv, k, v, slots)

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        """Keep the queries and attend as ever."""
        self._of(kv)[0].append(q.float())
        return self._inner.attend(q, kv, plan, observe)

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge as ever."""
        return self._inner.merge(outs, lse2s)

    def _of(self, kv: LayerKV) -> tuple[list[torch.Tensor], ...]:
        return self._kept.setdefault(kv.layer, ([], [], []))


@dataclass(frozen=True, slots=True)
class Form:
    """A way of coding keys and values; the defaults are `k2v2` as it is served."""

    name: str
    bits: int = 2
    page: int = 64
    axes: Literal["ours", "arXiv"] = "ours"
    """Of scales: keys' per channel and values' per token, or both along their sums."""
    rotate: bool = True
    rotate_values: bool = False
    fit: bool = True
    norms: bool = False
    """Each token's norm is stored apart, of keys and of values; its codes are of what is left."""
    stochastic: bool = False
    again: bool = False
    """The page that is being filled is coded again with every token, from its own codes."""

    def coded(self, heads: Heads) -> Heads:
        """Return a layer with keys and values as they come back, the first `SPAN` tokens too."""
        turn = hadamard(heads.k.shape[2])
        k = heads.k @ turn.k if self.rotate else heads.k
        v = heads.v @ turn.k if self.rotate_values else heads.v
        k_norm, v_norm = (self._norm(x) for x in (k, v))
        along = [self._along_tokens, self._along_channels]
        one, other = along if self.axes == "ours" else along[::-1]
        k = one(k / k_norm, self.bits, fit=self.fit) * k_norm
        v = other(v / v_norm, 2, fit=False) * v_norm
        return Heads(
            heads.q,
            k @ turn.q.T if self.rotate else k,
            v @ turn.q.T if self.rotate_values else v,
        )

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """Return [N, T, 1] what tokens are divided by before they are coded, as it is stored."""
        if not self.norms:
            return torch.ones(())
        norm = x.norm(dim=2, keepdim=True).bfloat16().float()
        return torch.where(norm > 0, norm, 1.0)

    def bytes_ratio(self, dim: int) -> float:
        """Return the bytes of a token over bfloat16's; the published form stores its sums."""
        part = min(self.page, PARTITION, dim)
        per_channel, per_token = 4 * dim / self.page, 4 * dim / part
        sums = (dim / self.page + dim / part) if self.axes == "arXiv" else 0.0
        norms = 4.0 if self.norms else 0.0
        return ((self.bits + 2) * dim / 8 + per_channel + per_token + sums + norms) / (4 * dim)

    def _along_tokens(self, x: torch.Tensor, bits: int, *, fit: bool) -> torch.Tensor:
        """Return x [N, T, D] coded with scales per channel over a page of tokens."""
        pages = x.reshape(len(x), -1, self.page, x.shape[2])
        if not self.again:
            return self._back(pages, bits, 2, fit=fit).flatten(1, 2)
        held = pages[:, :, :1]
        for count in range(1, self.page):
            held = self._back(
                torch.cat([held, pages[:, :, count : count + 1]], 2), bits, 2, fit=fit
            )
        return held.flatten(1, 2)

    def _along_channels(self, x: torch.Tensor, bits: int, *, fit: bool) -> torch.Tensor:
        """Return x [N, T, D] coded with scales per token over a partition of channels."""
        parts = x.reshape(*x.shape[:2], -1, min(self.page, PARTITION, x.shape[2]))
        return self._back(parts, bits, 3, fit=fit).flatten(2)

    def _back(self, x: torch.Tensor, bits: int, axis: int, *, fit: bool) -> torch.Tensor:
        stored: Affine = (fitted if fit and bits == 2 else affine)(x, bits, axis)
        if self.stochastic:
            exact = (x - stored.least.float()) / stored.scale.float()
            draw = torch.rand(exact.shape, generator=torch.Generator().manual_seed(0))
            codes = (exact + draw).floor().clamp(0, (1 << bits) - 1)
        else:
            codes = quantise(x, stored, bits).float()
        return stored.scale.float() * codes + stored.least.float()


SERVED: Final = Form("k2v2 as served")
PLAIN: Final = replace(SERVED, name="ours, nearest", rotate=False, fit=False)
PAPER: Final = replace(PLAIN, name="arXiv, nearest", axes="arXiv")
FORMS: Final[dict[str, tuple[Form, ...]]] = {
    "page": tuple(replace(SERVED, name=f"{n} tokens", page=n) for n in (32, 64, 128)),
    "axes": (PLAIN, PAPER),
    "rounding": (
        SERVED,
        replace(SERVED, name="k2v2, at random", stochastic=True),
        replace(PLAIN, name="ours, at random", stochastic=True),
        replace(PAPER, name="arXiv, at random", stochastic=True),
    ),
    "coded again": (
        replace(PLAIN, name="ours, with every token", again=True),
        replace(PAPER, name="arXiv, with every token", again=True),
    ),
    "rotation and fit": (
        replace(SERVED, name="rotated alone", fit=False),
        replace(SERVED, name="fitted alone", rotate=False),
        replace(SERVED, name="values rotated too", rotate_values=True),
        replace(SERVED, name="norms apart", norms=True),
    ),
    "bits": (replace(SERVED, name="k4v2", bits=4),),
}


def attended(heads: Heads, coded: Heads, begin: int, end: int) -> torch.Tensor:
    """Return float64 outputs [ROWS, Hq, D] of the last rows, tokens [begin, end) as coded."""
    count, num_kv_heads, dim = heads.k.shape[1], heads.k.shape[0], heads.k.shape[2]
    k, v = (
        torch.cat([x[:, :begin], y[:, begin:end], x[:, end:]], 1).double()
        for x, y in ((heads.k, coded.k), (heads.v, coded.v))
    )
    q = heads.q[count - ROWS : count].double().reshape(ROWS, num_kv_heads, -1, dim)
    scores = torch.einsum("thgd,hsd->hgts", q, k) / dim**0.5
    seen = torch.arange(count) <= torch.arange(count - ROWS, count)[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hgts,hsd->thgd", weights, v).flatten(1, 2)


def error_of(form: Form, layers: Sequence[Heads]) -> float:
    """Return the mean over layers, heads and rows of |difference| over |output|."""
    found = []
    for heads in layers:
        begin, end = SPAN, (heads.k.shape[1] - ROWS) // SPAN * SPAN
        inside = Heads(heads.q, heads.k[:, begin:end], heads.v[:, begin:end])
        back = form.coded(inside)
        whole = Heads(
            heads.q,
            *(torch.nn.functional.pad(x, (0, 0, begin, 0)) for x in (back.k, back.v)),
        )
        exact = attended(heads, heads, begin, end)
        off = attended(heads, whole, begin, end) - exact
        found.append((off.norm(dim=-1) / exact.norm(dim=-1)).mean())
    return float(torch.stack(found).mean())


def sampled(options: Options) -> list[list[Heads]]:
    """Return what the demo model computes of contexts of the quality suite, layer by layer."""
    taps: list[Tap] = []

    def tapped(inner: AttentionOps) -> Tap:
        taps.append(Tap(inner))
        return taps[-1]

    asked = Asked(Machine(DEMO_MODEL, options.threads), Float(), tapped)
    maker = Maker(read(), asked.text, asked.info.vocab_size)
    contexts = [c for c in maker.contexts(quick=True) if len(c.ids) >= 2 * SPAN + ROWS]
    found = []
    for number, context in enumerate(contexts[: 3 if options.quick else None]):
        taps[0].taken()  # of the warm-up
        asked.answer([(str(number), context.ids)], greedy(1))
        found.append(taps[0].taken())
    return found


def error_rows(options: Options) -> list[Row]:
    """Return each form's error: the median over contexts with its interval."""
    sample = sampled(options)
    rows: list[Row] = []
    dim = sample[0][0].k.shape[2]
    for ablation, forms in FORMS.items():
        for form in forms:
            found = estimate([error_of(form, layers) for layers in sample])
            rows.append(
                {
                    "ablation": ablation,
                    "form": form.name,
                    "error": found.median,
                    "low": found.low,
                    "high": found.high,
                    "bytes over bf16": form.bytes_ratio(dim),
                }
            )
    return rows


class Work(NamedTuple):
    """What takes time with an idea and without it; the callables return seconds."""

    without: str
    on: str
    context: int
    kept: Callable[[], float]
    left_out: Callable[[], float]


def compared(work: Work, pairs: int) -> tuple[Estimate, Row]:
    """Return what leaving the idea out takes more, and its row; the order alternates."""
    less: list[float] = []
    more: list[float] = []
    for turn in range(pairs):
        for kept in (True, False) if turn % 2 else (False, True):
            (less if kept else more).append((work.kept if kept else work.left_out)())
    share = estimate([b / a - 1 for a, b in zip(less, more, strict=True)])
    row: Row = {
        "without": work.without,
        "on": work.on,
        "context": work.context,
        "with it, us": float(np.median(less)) * 1e6,
        "without it, us": float(np.median(more)) * 1e6,
        "takes more": share.median,
        "low": share.low,
        "high": share.high,
    }
    return share, row


def seconds_of(call: Callable[[], object], least_s: float) -> float:
    """Return the mean seconds of calls that go on for a while."""
    count, begun = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begun < least_s:
        call()
        count += 1
    return (time.perf_counter() - begun) / count


def in_torch(context: int, least_s: float) -> list[Work]:
    """Return the published form with and without stored sums, and an open block in floats."""
    step = paper_step(KV_HEADS, context, DIM)
    q = torch.randn(KV_HEADS, GROUP, DIM)

    def taken(*, stored: bool, open_block: bool) -> Callable[[], float]:
        return lambda: seconds_of(
            lambda: step.attend(q, stored=stored, open_block=open_block), least_s
        )

    kept = taken(stored=True, open_block=True)
    on = "published form, torch"
    return [
        Work(SUMS, on, context, kept, taken(stored=False, open_block=True)),
        Work(REQUANTISING, on, context, kept, taken(stored=True, open_block=False)),
    ]


def in_kernel(ops: CpuAttention, context: int, least_s: float) -> list[Work]:
    """Return one more row of integer products, and a page encoded with every token, on `k2v2`.

    Sums of codes are products with ones, so making them takes at most what one more row does.
    """
    pages = pages_of(Layout.K2V2, DIM, context)
    codec = Hack(Layout.K2V2)
    k, v = torch.randn(2, KV_HEADS, PAGE_TOKENS, DIM).bfloat16()
    each = context * KV_HEADS * 1e-9

    def attend(group: int) -> float:
        q = torch.randn(1, KV_HEADS * group, DIM).bfloat16()
        return ns_per_token((ops, pages), q, least_s) * each

    def encode() -> float:
        return seconds_of(lambda: codec.encode(k, v, Place(0, first=False)), least_s)

    found = [
        Work(SUMS, f"our kernel, {g} + 1 rows", context, partial(attend, g), partial(attend, g + 1))
        for g in GROUPS
    ]
    once = Work(
        REQUANTISING,
        "our kernel and encoder",
        context,
        lambda: attend(GROUP) + encode() / PAGE_TOKENS,
        lambda: attend(GROUP) + encode(),
    )
    return [*found, once]


def measure(ops: CpuAttention, options: Options) -> Report:
    """Return errors of all forms, and what eliminations save."""
    rows = error_rows(options)
    figures: list[Figure] = []
    pairs, least_s = (3, 0.02) if options.quick else (MIN_PAIRS, 0.2)
    for context in CONTEXTS:
        torch_works = in_torch(context, least_s)
        for work in (*torch_works, *in_kernel(ops, context, least_s)):
            share, row = compared(work, pairs)
            rows.append(row)
            if work in torch_works:
                what = work.without.replace(" ", "_")
                figures.append(Figure(f"ablation_no_{what}_{context // 1024}k", share))
    return Report("quant", {}, figures, rows)
