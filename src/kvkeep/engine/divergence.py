"""How far a request's next-token distribution is from its shadow's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvkeep.engine.probes import CUE_TOKENS
from kvkeep.engine.runner import Stepped
from kvkeep.engine.work import Work


class Divergence(NamedTuple):
    """Of one row."""

    kl_nats: float
    """KL(shadow || served), natural log."""
    agrees: bool
    """Whether the most likely token is the same."""


def divergence(shadow: torch.Tensor, served: torch.Tensor) -> Divergence | None:
    """Compare two rows of logits [V], in float64; None where that is no number.

    A token that is ruled out, at -inf, adds nothing.
    """
    true, coded = (torch.log_softmax(row.double(), 0) for row in (shadow, served))
    if true.isnan().any() or coded.isnan().any():
        return None
    weights = true.exp()
    kl = float(torch.where(weights > 0, weights * (true - coded), 0.0).sum())
    if not math.isfinite(kl):
        return None
    return Divergence(max(kl, 0.0), bool(true.argmax() == coded.argmax()))


def compare(work: Sequence[Work], stepped: Stepped) -> None:
    """Hand each sample the row that its request and its shadow computed in one step."""
    if not any(item.shadow for item in work):
        return
    sampling = (item for item in work if item.samples)
    rows = {
        (item.sequence, item.shadow): row for row, item in enumerate(sampling, stepped.prompt_rows)
    }
    for (sequence, shadow), row in rows.items():
        sample = sequence.request.sample
        if not shadow or sample is None:
            continue
        own = sequence, False
        found = divergence(stepped.logits[row], stepped.logits[rows[own]])
        if found is None or sample.settled:
            sample.skip()
            continue
        sample.add(found.kl_nats, agrees=found.agrees)
        planted = sequence.planted
        if planted is not None and sequence.generated >= CUE_TOKENS:
            told = [int(stepped.logits[at].argmax()) == planted for at in (row, rows[own])]
            if told[0]:
                sample.recall(served=told[1])
