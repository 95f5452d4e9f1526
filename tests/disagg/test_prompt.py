"""A block opens in its own place of its own prompt alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvkeep.disagg.prefill import NothingBelow
from kvkeep.disagg.prompt import PromptPages, below_of
from kvkeep.disagg.wire import Block
from kvkeep.errors import ConfigError, SealError
from kvkeep.shield.plain import PlainSealer
from kvkeep.types import PAGE_TOKENS, PageTag
from tests.cache.player import make_manager, prompt
from tests.engines import request

TOKENS = prompt(1, 2, 3, 4, tail=9)
TAG = PageTag("scope-a", "float")
BLOCK = Block(request=1, layer=0, layers=1, first_page=1, pages=2, tag=TAG.digest())


def pages_of(tokens: Any = TOKENS, tenant: str = "a", tag: PageTag = TAG) -> PromptPages:
    manager = make_manager(16, tier=NothingBelow())
    return PromptPages(manager, request(tokens, tenant=tenant), tag, PlainSealer())


def frame(pages: PromptPages, block: Block) -> memoryview:
    return pages.seal(block, bytes(sum(pages.sizes(block))))


def opens(pages: PromptPages, block: Block, sealed: memoryview) -> bool:
    try:
        pages.open(block, sealed)
    except SealError:
        return False
    return True


def test_a_block_opens_for_whoever_has_the_same_prompt() -> None:
    sealed = frame(pages_of(), BLOCK)
    assert opens(pages_of(), BLOCK, sealed)
    assert opens(pages_of(), BLOCK._replace(request=9), sealed), "either side counts for itself"
    assert opens(pages_of([*TOKENS[: 3 * PAGE_TOKENS], 5, 6]), BLOCK, sealed)


@pytest.mark.parametrize(
    "moved", [{"layer": 1}, {"first_page": 2}, {"first_page": 0}, {"layers": 2, "pages": 1}]
)
def test_a_block_opens_in_no_other_place(moved: dict[str, Any]) -> None:
    sealed = frame(pages_of(), BLOCK)
    assert not opens(pages_of(), BLOCK._replace(**moved), sealed)


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": [7, *TOKENS[1:]]},
        {"tokens": [*TOKENS[: 3 * PAGE_TOKENS - 1], 7, *TOKENS[3 * PAGE_TOKENS :]]},
        {"tenant": "b"},
        {"tag": replace(TAG, scope="scope-b")},
        {"tag": replace(TAG, codec="k2v2")},
    ],
)
def test_a_block_opens_for_no_other_prompt_tenant_or_form(other: dict[str, Any]) -> None:
    assert not opens(pages_of(**other), BLOCK, frame(pages_of(), BLOCK))


def test_an_engine_without_names_for_its_pages_is_refused() -> None:
    with pytest.raises(ConfigError, match="without a place for pages to go to"):
        below_of(make_manager(16))
