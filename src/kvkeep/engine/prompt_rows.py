"""Rows of a step that belong to prompts asked for log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable

from kvkeep.engine.runner import Stepped
from kvkeep.engine.sampling import Sampler
from kvkeep.engine.sequence import Status
from kvkeep.engine.work import Work


def take_prompt_rows(work: Iterable[Work], stepped: Stepped, sampler: Sampler) -> None:
    """Hand each prompt the logits of its rows, the leading ones of the step's."""
    row = 0
    for item in work:
        prompt = item.sequence.output.prompt
        if prompt is None:
            continue
        count = max(0, min(item.start + item.count, item.sequence.prompt_len) - item.start)
        if item.sequence.status is Status.RUNNING:
            prompt.add(sampler, stepped.logits[row : row + count], item.start)
        row += count
