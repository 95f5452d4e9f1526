"""What a sequence that has no view yet waits for, and what it may then find."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvkeep.cache.manager import CacheManager
from kvkeep.cache.matching import Match
from kvkeep.engine.handing import awaits
from kvkeep.engine.sequence import Sequence, Status
from kvkeep.types import Int32Array, PageSpec


def under_way(sequence: Sequence) -> bool:
    """Tell whether its prompt is computed elsewhere, and pages, rows or first token are not here.

    Others need not wait for that: what it needs now has its room. Where there is none, they do.
    """
    request = sequence.request
    if not (awaits(request.spec) and sequence.asked):
        return False
    part, fetch = request.part, sequence.fetch
    coming = part is not None and part.state == "awaited"
    return request.lacks or coming or (fetch is not None and not fetch.done)


def matched(sequence: Sequence, manager: CacheManager) -> Match:
    """Return what of a sequence's prefix is there, in memory or below."""
    return manager.match(
        sequence.tokens.ids()[: reusable(sequence, manager.pool.spec)],
        account=sequence.account,
        scope=sequence.request.spec.scope,
    )


def begin_fetch(sequence: Sequence, match: Match, manager: CacheManager) -> bool:
    """Fetch a sequence's pages from below memory, if there are any and room for them."""
    sequence.fetch = manager.begin_fetch(match, sequence.tokens.ids())
    if sequence.fetch is not None:
        sequence.status, sequence.asked = Status.WAITING_FETCH, True
    return sequence.fetch is not None


def fetch_early(sequence: Sequence, before: Iterable[Sequence], manager: CacheManager) -> None:
    """Fetch what the next sequence will need, while all that may run do; it is asked once.

    Its pages make way for whoever runs, and what came is matched anew in its turn.
    """
    if sequence.looked or sequence.fetch or awaits(sequence.request.spec):
        return
    sequence.looked = True
    match = matched(sequence, manager)
    if not match.pending or awaited(sequence, before, match, manager):
        return
    if manager.has_room(match, len(sequence.tokens)):
        begin_fetch(sequence, match, manager)


def reusable(sequence: Sequence, pages: PageSpec) -> int:
    """Return how many leading tokens may come from the cache."""
    request = sequence.request
    if request.spec.params.prompt_logprobs is not None and not sequence.generated:
        return 0
    # A block that holds the last row is computed, but where another engine tells what comes next.
    computed = pages.window_tokens is not None and not request.awaits
    most = len(sequence.tokens) - computed
    return most if request.watch is None else min(most, request.watch.first)


def awaited(
    sequence: Sequence, before: Iterable[Sequence], match: Match, manager: CacheManager
) -> bool:
    """Tell whether a prompt before it, here or elsewhere, is computing pages it could use.

    It waits for the whole of that prompt, so that what it finds tells nothing of the pace.
    """
    tokens = sequence.tokens.ids()[: reusable(sequence, manager.pool.spec)]
    found = len(match.public) + len(match.own)
    for other in before:
        known = _to_come(other, sequence, match)[: len(tokens)]
        differ = np.flatnonzero(tokens[: len(known)] != known)
        same = int(differ[0]) if len(differ) else len(known)
        if manager.findable_pages(same) > found:
            return True
    return False


def _to_come(other: Sequence, sequence: Sequence, match: Match) -> Int32Array:
    """Return the tokens whose pages a sequence will find once another one's prompt is whole."""
    view = other.view
    if view is None:
        one, two = other.request, sequence.request
        alike = (one.spec.scope, one.codec) == (two.spec.scope, two.codec)
        indexed = one.spec.store and one.part is None
        return other.tokens.ids(None if alike and indexed else 0)
    whole = not other.uncommitted and view.length >= other.prompt_len
    return other.tokens.ids(0 if whole or view.tag != match.tag else view.tainted_from)
