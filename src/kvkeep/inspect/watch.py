"""One prompt run through an engine that is watched: a page as computed, a page as stored."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import torch

from kvkeep.attention.planner import FlatPlanner
from kvkeep.engine.api import FinishReason, GenerateRequest, ModelInfo, SamplingParams
from kvkeep.engine.backend import choose
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts, build_core
from kvkeep.engine.options import EngineOptions, SharingOptions
from kvkeep.errors import ConfigError, EngineError
from kvkeep.eviction.policy import KeepAll
from kvkeep.ops.layout import Attended, AttentionOps, AttentionPlan, LayerKV, Observe
from kvkeep.quant.codec import Codec, KVShape, Place, Tiles
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield, Shield
from kvkeep.types import PAGE_TOKENS, Int32Array

TENANT: Final = "inspect"


@dataclass(frozen=True, slots=True)
class Seen:
    """What one prompt's run left, keys as the model has them."""

    k: torch.Tensor
    """[L, Hkv, S, D] float32, as computed, as is `v`."""
    v: torch.Tensor
    stored_k: torch.Tensor
    """[L, Hkv, S, D] float32: what the stored page stands for, as is `stored_v`."""
    stored_v: torch.Tensor
    out: torch.Tensor
    """[L, Hq, D] float32 attention of the prompt's last token."""
    info: ModelInfo


class WatchedAttention:
    """Attention as ever that remembers the rows of one page and the last row's output."""

    def __init__(self, inner: AttentionOps) -> None:
        self._inner = inner
        self._rows: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._out: dict[int, torch.Tensor] = {}

    @property
    def bytes_read(self) -> int:
        """Return what was read so far."""
        return self._inner.bytes_read

    def append(self, kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: Int32Array) -> None:
        """Write the rows and remember them."""
        self._inner.append(kv, k, v, slots)
        self._rows.setdefault(kv.layer, []).append((k.float(), v.float()))

    def attend(
        self, q: torch.Tensor, kv: LayerKV, plan: AttentionPlan, observe: Observe | None = None
    ) -> Attended:
        """Attend as ever and remember the last row."""
        attended = self._inner.attend(q, kv, plan, observe)
        self._out[kv.layer] = attended.out[-1].float()
        return attended

    def merge(self, outs: torch.Tensor, lse2s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge as ever."""
        return self._inner.merge(outs, lse2s)

    def forget(self) -> None:
        """Begin afresh: what an engine's warm-up wrote is not asked for."""
        self._rows.clear()

    def page(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k, v [L, Hkv, S, D] of the rows of a page."""
        rows = slice(number * PAGE_TOKENS, (number + 1) * PAGE_TOKENS)
        layers = [self._rows[layer] for layer in sorted(self._rows)]
        k, v = (
            torch.stack([torch.cat([step[i] for step in steps])[rows] for steps in layers])
            for i in (0, 1)
        )
        return k.transpose(1, 2), v.transpose(1, 2)

    def out(self) -> torch.Tensor:
        """Return [L, Hq, D] of the last row."""
        return torch.stack([self._out[layer] for layer in sorted(self._out)])


@dataclass(frozen=True, slots=True)
class Ran:
    """A prompt's run."""

    attention: WatchedAttention
    info: ModelInfo
    shape: KVShape


class WatchedCodec:
    """A codec as ever that remembers the tiles of one page of the only sequence."""

    def __init__(self, inner: Codec, page: int) -> None:
        self.name = inner.name
        self.page_spec, self.folds, self.rotation = inner.page_spec, inner.folds, inner.rotation
        self.decode = inner.decode
        self.tiles: dict[int, Tiles] = {}
        self._inner = inner
        self._page = page
        self._pages: Counter[int] = Counter()

    def encode(self, k: torch.Tensor, v: torch.Tensor, place: Place) -> Tiles:
        """Encode as ever."""
        tiles = self._inner.encode(k, v, place)
        if self._pages[place.layer] == self._page:
            self.tiles[place.layer] = tiles.copy()
        self._pages[place.layer] += 1
        return tiles


def watch(options: EngineOptions, codec: Codec, ids: Sequence[int], page: int) -> Seen:
    """Return what a page of a prompt is as computed and as stored, and what attention made of it.

    Raises `ConfigError` where the prompt has no such page, `EngineError` where it can't be run.
    """
    _require_page(len(ids), page)
    watched = WatchedCodec(codec, page)
    ran = run_prompt(options, watched, NoShield(), ids)
    attention, shape = ran.attention, ran.shape
    k, v = attention.page(page)
    stored = k, v
    if watched.tiles:
        decoded = [
            codec.decode(watched.tiles[layer], shape, Place(layer, page == 0))
            for layer in range(shape.num_layers)
        ]
        stored = torch.stack([k for k, _ in decoded]), torch.stack([v for _, v in decoded])
    turn = codec.rotation(shape)
    back = torch.eye(shape.head_dim) if turn is None else turn.q.T
    return Seen(k @ back, v, stored[0].float() @ back, stored[1].float(), attention.out(), ran.info)


def run_prompt(options: EngineOptions, codec: Codec, shield: Shield, ids: Sequence[int]) -> Ran:
    """Run a prompt alone, with attention that remembers what it was given to store.

    Raises `EngineError` where it can't be run.
    """
    backend = choose(options, options.threads or len(os.sched_getaffinity(0)))
    attention = WatchedAttention(backend.ops.attention)
    core = build_core(
        msgspec.structs.replace(options, max_num_seqs=1, share=SharingOptions(), guard_share=0.0),
        parts=Parts(
            techniques=Techniques(codec, shield, KeepAll()),
            planner=FlatPlanner(),
            policy=ShareNothing(),
            backend=replace(backend, ops=replace(backend.ops, attention=attention)),
        ),
    )
    attention.forget()
    core.set_tenants({TENANT: 1.0})
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    core.submit(
        GenerateRequest(
            id=TENANT, tenant=TENANT, scope=TENANT, prompt_ids=tuple(ids), params=params
        )
    )
    while not core.idle():
        for output in core.step():
            if output.chunk.finish is FinishReason.ERROR:
                raise EngineError(output.chunk.error or "the engine gave up without a reason")
    core.close()
    info, layouts = core.info, backend.ops.layouts
    layout = layouts[getattr(torch, info.dtype)]
    return Ran(attention, info, KVShape(info.num_layers, info.num_kv_heads, info.head_dim, layout))


def _require_page(tokens: int, page: int) -> None:
    whole = tokens // PAGE_TOKENS
    if not whole:
        raise ConfigError(
            f"text: {tokens} tokens make no page of {PAGE_TOKENS}; give a longer text"
        )
    if page >= whole:
        raise ConfigError(
            f"page: the text has no page {page}; choose one of 0 to {whole - 1},"
            " or give a longer text"
        )
