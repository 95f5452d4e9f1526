"""Answers in OpenAI's shapes, and the parts both endpoints share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from kvkeep.engine.api import Chunk, FinishReason, TokenLogprob

_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
_FLOOR = -9999.0
"""Stands for minus infinity, which JSON can't write."""


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How much of the prompt was taken from the cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, over all of its prompts and sequences."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    """An alternative token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """A chosen token and its alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a chat's answer."""

    content: list[ChatTokenLogprob]


class AnswerMessage(msgspec.Struct, frozen=True):
    """The assistant's message."""

    role: str
    content: str


class Delta(msgspec.Struct, frozen=True):
    """What is new of a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One whole answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None


class ChatDeltaChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities of a completion, one entry per token in each list."""

    text_offset: list[int] = msgspec.field(default_factory=list)
    token_logprobs: list[float | None] = msgspec.field(default_factory=list)
    tokens: list[str] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = msgspec.field(default_factory=list)


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One completion, whole or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """A whole chat completion."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDeltaReply(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatDeltaChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionReply(msgspec.Struct, frozen=True, kw_only=True):
    """A whole completion, or one event of its stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "kvkeep"
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models that are served."""

    object: str = "list"
    data: list[ModelCard]


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenised prompt."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """The text of token ids."""

    prompt: str


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the server answers; nothing of its load."""

    status: str


@dataclass(frozen=True, slots=True)
class Head:
    """What every event and answer of one request repeats."""

    id: str
    created: int
    model: str


@dataclass(slots=True)
class Tally:
    """Counts a request's tokens as they come, for `usage` and for the log."""

    prompt_tokens: int
    completion_tokens: int = 0
    finish: str | None = None
    _cached: dict[int, int] = field(default_factory=dict)
    _forms: set[str] = field(default_factory=set)

    def add(self, prompt: int, chunk: Chunk) -> None:
        """Count one chunk."""
        self.completion_tokens += len(chunk.token_ids) + chunk.unsent_tokens
        self._cached[prompt] = chunk.cached_tokens
        if chunk.finish is not None:
            self.finish = chunk.finish.value
        if chunk.kv is not None:
            self._forms.add(chunk.kv)

    @property
    def cached_tokens(self) -> int:
        """Return the prompt tokens taken from the cache, over all prompts."""
        return sum(self._cached.values())

    @property
    def kv(self) -> str | None:
        """Return how pages were stored, over all prompts that ended; None: none has."""
        return ", ".join(sorted(self._forms)) or None

    def usage(self) -> Usage:
        """Return the counts so far."""
        total = self.prompt_tokens + self.completion_tokens
        details = PromptTokensDetails(self.cached_tokens)
        return Usage(self.prompt_tokens, self.completion_tokens, total, details)


def finish_name(reason: FinishReason) -> str:
    """Return OpenAI's name of a good ending."""
    return _FINISH[reason]


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Return log-probabilities in the chat's shape."""
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                t.text,
                finite(t.logprob),
                list(t.text.encode()),
                [TopLogprob(text, finite(p), list(text.encode())) for _, text, p in t.top],
            )
            for t in tokens
        ]
    )


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can write."""
    return max(logprob, _FLOOR)
