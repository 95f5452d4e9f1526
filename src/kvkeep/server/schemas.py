"""Requests as OpenAI's clients send them: types and plain ranges; `validation` does the rest."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_NotNegative = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Unit = Annotated[float, Meta(ge=0, le=1)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stream carries beside its tokens."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage in every event, not only in one at the end."""
    include_obfuscation: bool | None = None
    """Taken and without effect."""


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints take; None is the default everywhere."""

    model: str
    max_tokens: _NotNegative | None = None
    min_tokens: _NotNegative | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: _Unit | None = None
    n: _Positive | None = None
    best_of: _Positive | None = None
    """Sequences generated; the `n` with the highest mean log-probability per token are returned."""
    use_beam_search: bool | None = None
    """Search with `best_of`, else `n`, beams instead of sampling."""
    length_penalty: Annotated[float, Meta(ge=-10, le=10)] | None = None
    """A beam's log-probability is divided by its length to this power."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[_NotNegative] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | UnsetType = UNSET


class ContentPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a message; only text is served."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message of a chat."""

    role: str
    content: str | list[ContentPart] | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Only plain text is served."""

    type: str


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: _NotNegative | None = None
    logprobs: bool | None = None
    top_logprobs: _NotNegative | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | _NotNegative | list[_NotNegative]]
    echo: bool | None = None
    logprobs: _NotNegative | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /tokenize: a prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[_NotNegative]


COSMETIC_FIELDS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "prediction",
        "request_id",
        "priority",
    }
)
"""Fields that change no answer: taken, ignored, and counted by name."""

COSMETIC_MESSAGE_FIELDS = frozenset({"name"})

UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "echo": (False,),
    "top_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "early_stopping": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "documents": (),
}
"""Fields that would change the answer and are not served, with the values that ask for nothing.

Null always asks for nothing.
"""

UNSUPPORTED_MESSAGE_FIELDS: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "reasoning_content": (),
}
"""The same for a message's fields: answers sent back as history carry them empty."""
