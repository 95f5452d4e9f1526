"""How the cache's memory is divided: pages, larger ones for first pages, staged ones beside."""

from __future__ import annotations

import sys
from typing import Final, NamedTuple

from kvkeep.cache.classes import Beside
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from kvkeep.types import PAGE_TOKENS, PageSpec

FIRST_EVERY: Final = 16
"""Beside one for each sequence that may run, every so many pages one may be a first page."""


class Division(NamedTuple):
    """Numbers of pages; fixed once an engine has started."""

    num_pages: int
    beside: Beside | None


def most_pages(options: EngineOptions, max_model_len: int) -> int:
    """Return how many pages are of use: all that are asked for, or what sequences can fill."""
    if options.kv_cache_bytes is not None:
        return sys.maxsize
    return max(2, options.max_num_seqs * (max_model_len // PAGE_TOKENS + 2))


def divide(
    spec: PageSpec, staged_tile_bytes: int, wanted_bytes: int, options: EngineOptions, most: int
) -> Division:
    """Return how many pages of each kind fit; at most `most` that tenants' shares are made of.

    Raises `ConfigError` where that is not enough to run.
    """
    if spec.window_tokens is None:
        pages = wanted_bytes // spec.page_bytes
        return Division(_enough(min(pages, most), wanted_bytes, spec), None)
    staged, float_bytes = (
        staged_pages(spec.window_tokens, options),
        spec.tiles_per_page * staged_tile_bytes,
    )
    kept, part = 0, kept_part(options)
    if part:
        kept = _enough(min(int(wanted_bytes * part) // float_bytes, most), wanted_bytes, spec)
    rest = wanted_bytes - (staged + kept) * float_bytes
    if rest < 2 * spec.page_bytes:
        raise ConfigError(
            f"kv_cache_memory_bytes: {wanted_bytes} bytes, and {wanted_bytes - rest} of them for"
            f" the recent tokens of max_num_seqs = {options.max_num_seqs} sequences: raise the"
            " memory or lower max_num_seqs"
        )
    low, high = 0, min(rest // spec.page_bytes, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if _coded_bytes(spec, middle, options) <= rest else (low, middle - 1)
        )
    first = _first_pages(spec, low, options)
    beside = Beside(first, staged, staged_tile_bytes, kept)
    return Division(_enough(low, wanted_bytes, spec), beside)


def kept_part(options: EngineOptions) -> float:
    """Return the part of the memory for pages that are not coded, where others are."""
    if options.kv == "auto":
        return options.kv_auto_memory
    return options.guard_memory if options.guard_share else 0.0


def held_bytes(spec: PageSpec, float_tile_bytes: int, tokens: int) -> int:
    """Return what one running sequence of so many tokens holds.

    A page has its place as codes from its first token on, and one in the model's dtype beside it
    until its block has ended.
    """
    pages = -(-tokens // PAGE_TOKENS)
    coded = pages * spec.page_bytes
    if spec.window_tokens is None or not pages:
        return coded
    ended = tokens // spec.window_tokens * spec.block_pages
    extra = spec.first_page_bytes - spec.page_bytes
    return coded + extra + (pages - ended) * spec.tiles_per_page * float_tile_bytes


def staged_pages(window_tokens: int, options: EngineOptions) -> int:
    """Return the staged pages that the largest step needs, whoever's sequences it holds.

    A sequence needs its block, and the pages that a chunk of its prompt reaches beyond it.
    """
    seqs, rows = options.max_num_seqs, options.max_num_batched_tokens
    return seqs * (window_tokens // PAGE_TOKENS) + min(seqs, rows // 2) + -(-rows // PAGE_TOKENS)


def _first_pages(spec: PageSpec, pages: int, options: EngineOptions) -> int:
    if not spec.first_extra_bytes:
        return 0
    return min(pages, pages // FIRST_EVERY + options.max_num_seqs + 1)


def _coded_bytes(spec: PageSpec, pages: int, options: EngineOptions) -> int:
    """Return the bytes of so many pages: any of a share may be plain, some may be first ones."""
    return pages * spec.page_bytes + _first_pages(spec, pages, options) * spec.first_page_bytes


def _enough(pages: int, wanted_bytes: int, spec: PageSpec) -> int:
    if pages < 2:
        raise ConfigError(
            f"kv_cache_memory_bytes: {wanted_bytes} bytes hold no two pages of {spec.page_bytes};"
            " raise it"
        )
    return pages
