"""Sequences of a step that others come from, and those whose rows are worth nothing."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

from kvkeep.engine.runner import Stepped
from kvkeep.engine.sequence import Request, Sequence
from kvkeep.engine.work import Work
from kvkeep.errors import EngineError, PartLost


def family_of(
    sequence: Sequence,
    make: Callable[[Request, int, int], Sequence],
    follow: Callable[[Sequence, Sequence], None],
) -> list[Sequence]:
    """Return the sequence, and on its request's first sampling step its new siblings too."""
    request, params = sequence.request, sequence.request.spec.params
    if sequence.generated or len(request.sequences) == params.width or params.max_tokens == 0:
        return [sequence]
    for index in range(1, params.width):
        sibling = make(request, index, sequence.sampling.seed)
        request.sequences.append(sibling)
        follow(sibling, sequence)
    return list(request.sequences)


def unstored(work: List[Work], stepped: Stepped) -> list[tuple[Sequence, EngineError]]:
    """Return the sequences whose keys or values could not be stored, and why."""
    views = [(item.sequence, item.sequence.view) for item in work] if stepped.failed else []
    found = [(one, stepped.failed.get(view.id)) for one, view in views if view is not None]
    return [(one, why) for one, why in found if why and not isinstance(why, PartLost)]


def lost_parts(work: List[Work], stepped: Stepped) -> list[Sequence]:
    """Return the sequences that attended to pages elsewhere which were lost in the step."""
    if not stepped.failed:
        return []
    return [w.sequence for w in work if isinstance(stepped.failed.get(w.view.id), PartLost)]
