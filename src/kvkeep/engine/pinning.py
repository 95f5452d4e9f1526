"""Prefixes the operator declares public, computed before anybody asks: nobody's use shows."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvkeep.cache.manager import CacheManager
from kvkeep.engine.api import GenerateRequest, SamplingParams
from kvkeep.engine.engine import EngineCore
from kvkeep.errors import ConfigError, InvalidRequest
from kvkeep.models.text import TextModel

PINNING = "pinning"
"""Tenant of the requests that compute pinned prefixes; gone before the first real one."""

_ROLES = {"role", "content"}


def pinned_prompts(path: Path, text: TextModel) -> list[list[int]]:
    """Return the token ids of a file's prefixes, `[[prefix]]` tables with `text` or `messages`.

    A conversation is rendered with the model's template, without the start of an answer.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("prefix")
    except OSError as error:
        raise ConfigError(f"share_pinned: can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"share_pinned: {path} is no TOML: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"share_pinned: {path} has no [[prefix]]; add one with text or messages")
    return [_prompt(entry, f"{path}, prefix {i + 1}", text) for i, entry in enumerate(entries)]


def _prompt(entry: Any, where: str, text: TextModel) -> list[int]:
    match entry:
        case {"text": str(words), **rest} if not rest:
            return text.encode(words)
        case {"messages": list(messages), **rest} if not rest and all(
            isinstance(m, dict) and set(m) == _ROLES for m in messages
        ):
            try:
                return text.apply_chat(messages, add_generation_prompt=False)
            except InvalidRequest as error:
                raise ConfigError(f"share_pinned: {where}: {error}") from None
    raise ConfigError(
        f"share_pinned: {where} needs either text or messages of role and content, nothing else"
    )


def pin(core: EngineCore, manager: CacheManager, prompts: Sequence[Sequence[int]]) -> int:
    """Compute prefixes and publish their full pages for good; return how many pages.

    Raises `ConfigError` where one is too long or half the pool does not hold them.
    """
    core.set_tenants({PINNING: 0.5})
    pinned = 0
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for i, ids in enumerate(prompts):
        request = GenerateRequest(
            id=f"{PINNING}-{i}", tenant=PINNING, scope=PINNING, prompt_ids=tuple(ids), params=params
        )
        core.submit(request)
        errors = []
        while not core.idle():
            errors += [output.chunk.error for output in core.step() if output.chunk.error]
        if errors:
            raise ConfigError(f"share_pinned: prefix {i + 1}: {errors[0]}")
        match = manager.match(ids, account=PINNING, scope=PINNING)
        twins = [manager.promote(page, pinned=True) for page in (*match.public, *match.own)]
        full = [page for page in twins if page is not None]
        if len(full) < manager.findable_pages(len(ids)):
            raise ConfigError("share_pinned: the prefixes do not fit half the cache; give it more")
        core.sharing.pins.add(page.hash for page in full)
        pinned += len(full)
    core.set_tenants({})
    return pinned
