"""What a request for several sequences may ask, checked the same for the server and for Python."""

from __future__ import annotations

from typing import Any, Final

from kvkeep.engine.api import SamplingParams
from kvkeep.errors import InvalidRequest

MAX_LENGTH_PENALTY: Final = 10.0

_WITHOUT_EFFECT: Final[dict[str, tuple[Any, ...]]] = {
    "temperature": (0.0, 1.0),
    "top_p": (1.0,),
    "top_k": (0,),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": ((),),
    "stop": ((),),
}
"""Fields that a beam search does not follow, with the values that ask for nothing."""


def check_fanout(params: SamplingParams) -> None:
    """Raise `InvalidRequest` where the fields for several sequences contradict others."""
    if params.best_of is not None and params.best_of < params.n:
        raise _refusal("best_of", "must not be below n")
    if params.ranks and params.max_tokens < 1:
        raise _refusal("max_tokens", "must be at least 1 where the best are chosen")
    if not params.use_beam_search:
        if params.length_penalty != 1.0:
            raise _refusal("length_penalty", "needs use_beam_search = true")
        return
    if not -MAX_LENGTH_PENALTY <= params.length_penalty <= MAX_LENGTH_PENALTY:
        bounds = f"{-MAX_LENGTH_PENALTY:g} and {MAX_LENGTH_PENALTY:g}"
        raise _refusal("length_penalty", f"must lie between {bounds}")
    for name, neutral in _WITHOUT_EFFECT.items():
        if getattr(params, name) not in neutral:
            raise _refusal(name, "has no meaning in a beam search; leave it out")


def _refusal(name: str, text: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {text}", param=name)
