"""FlashInfer's paged decode and its cascade over the pages of a cell; needs `flashinfer-python`."""

from __future__ import annotations

from typing import Any, Final

import flashinfer
import torch

from bench.attention_gpu import DeviceCell, Pass
from kvkeep.types import PAGE_TOKENS

WORKSPACE_BYTES: Final = 256 << 20


def _ints(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _tables(
    slots: list[list[int]], lengths: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return indptr, indices and the tokens of each last page."""
    ends = [0]
    for own in slots:
        ends.append(ends[-1] + len(own))
    indices = [slot for own in slots for slot in own]
    last = [(length - 1) % PAGE_TOKENS + 1 for length in lengths]
    return _ints(ends, device), _ints(indices, device), _ints(last, device)


def _caches(cell: DeviceCell) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return K and V [P, S, Hkv, D] of random numbers for each layer."""
    pages = 1 + max(slot for own in cell.slots for slot in own)
    shape = (pages, PAGE_TOKENS, cell.heads.kv, cell.heads.dim)

    def numbers() -> torch.Tensor:
        return torch.randn(shape, dtype=cell.q.dtype, device=cell.q.device)

    return [(numbers(), numbers()) for _ in cell.layers]


def _pass(wrapper: Any, cell: DeviceCell) -> Pass:
    caches = _caches(cell)

    def once() -> None:
        for cache in caches:
            wrapper.run(cell.q, cache)

    return once


def decode(cell: DeviceCell) -> Pass:
    """Return a pass in which every request reads its own pages."""
    device, heads = cell.q.device, cell.heads
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=heads.q // heads.kv >= 4
    )
    wrapper.plan(
        *_tables(cell.slots, cell.lengths, device),
        heads.q, heads.kv, heads.dim, PAGE_TOKENS,
        q_data_type=cell.q.dtype, kv_data_type=cell.q.dtype,
    )  # fmt: skip
    return _pass(wrapper, cell)


def cascade(cell: DeviceCell) -> Pass:
    """Return a pass of two levels: the pages all requests hold, then the rest of each."""
    device, heads = cell.q.device, cell.heads
    first = cell.slots[0]
    shared = 0
    while all(len(own) > shared + 1 and own[shared] == first[shared] for own in cell.slots):
        shared += 1
    rest = [own[shared:] for own in cell.slots]
    own_lengths = [length - shared * PAGE_TOKENS for length in cell.lengths]
    common = _tables([first[:shared]], [shared * PAGE_TOKENS], device)
    unique = _tables(rest, own_lengths, device)
    count = len(cell.slots)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    wrapper.plan(
        [_ints([0, count], device), _ints(list(range(count + 1)), device)],
        [common[0], unique[0]], [common[1], unique[1]], [common[2], unique[2]],
        heads.q, heads.kv, heads.dim, PAGE_TOKENS,
        q_data_type=cell.q.dtype,
    )  # fmt: skip
    return _pass(wrapper, cell)
