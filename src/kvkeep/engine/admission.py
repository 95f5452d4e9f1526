"""What a request must be before it is queued."""

from __future__ import annotations

from collections.abc import Collection

from kvkeep.cache.caches import Caches
from kvkeep.engine.api import GenerateRequest, ModelInfo
from kvkeep.engine.fanout import check_fanout
from kvkeep.errors import InvalidRequest
from kvkeep.types import PAGE_TOKENS


def check_request(
    spec: GenerateRequest,
    info: ModelInfo,
    tenants: Collection[str],
    caches: Caches,
    codec: str,
    *,
    apart: int = 0,
) -> None:
    """Raise `InvalidRequest` for what could never run; `apart` pages of it lie elsewhere."""
    length = len(spec.prompt_ids)
    check_fanout(spec.params)
    if spec.tenant not in tenants:
        raise InvalidRequest("tenant: not known to the engine", param="tenant")
    if not length:
        raise InvalidRequest("prompt: must hold at least one token", param="prompt")
    if length + min(1, spec.params.max_tokens) > info.max_model_len:
        raise InvalidRequest(
            f"prompt: {length} tokens leave no room for an answer within the model's"
            f" {info.max_model_len}; shorten it",
            param="prompt",
        )
    if not 0 <= min(spec.prompt_ids) <= max(spec.prompt_ids) < info.vocab_size:
        raise InvalidRequest("prompt: a token id is outside the vocabulary", param="prompt")
    if not caches.of(codec).fits(spec.tenant, length // PAGE_TOKENS + 1 - apart):
        raise InvalidRequest(
            f"prompt: {length} tokens do not fit this tenant's reserved share of the cache;"
            " shorten it or raise the share",
            param="prompt",
        )
