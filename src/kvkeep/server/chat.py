"""Turns what the engine says into chat completions, whole or as events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from kvkeep.engine.api import TokenLogprob
from kvkeep.server.generation import Event
from kvkeep.server.replies import (
    AnswerMessage,
    ChatChoice,
    ChatDeltaChoice,
    ChatDeltaReply,
    ChatReply,
    Delta,
    Head,
    Tally,
    Usage,
    chat_logprobs,
    finish_name,
)
from kvkeep.server.streaming import UsageMode, sse


@dataclass(slots=True)
class _Answer:
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = "stop"
    stop_match: str | int | None = None


class ChatAnswer:
    """Collects the `n` sequences of a request into one reply."""

    def __init__(self, head: Head, n: int, logprobs: bool) -> None:
        self._head = head
        self._logprobs = logprobs
        self._answers = [_Answer() for _ in range(n)]

    def add(self, event: Event) -> None:
        """Take what is new."""
        chunk = event.chunk
        answer = self._answers[chunk.index]
        answer.texts.append(chunk.text)
        answer.logprobs.extend(chunk.logprobs)
        if chunk.finish is not None:
            answer.finish, answer.stop_match = finish_name(chunk.finish), chunk.stop_match

    def json(self, tally: Tally) -> bytes:
        """Return the whole reply."""
        choices = [
            ChatChoice(
                index=i,
                message=AnswerMessage("assistant", "".join(a.texts)),
                logprobs=chat_logprobs(a.logprobs) if self._logprobs else None,
                finish_reason=a.finish,
                stop_reason=a.stop_match,
            )
            for i, a in enumerate(self._answers)
        ]
        head = self._head
        return msgspec.json.encode(
            ChatReply(
                id=head.id,
                object="chat.completion",
                created=head.created,
                model=head.model,
                choices=choices,
                usage=tally.usage(),
            )
        )


class ChatEvents:
    """Renders each chunk as a server-sent event."""

    def __init__(self, head: Head, logprobs: bool, usage: UsageMode) -> None:
        self._head = head
        self._logprobs = logprobs
        self._usage = usage
        self._opened: set[int] = set()

    def render(self, event: Event, tally: Tally) -> bytes:
        """Return the events of one chunk; empty where there is nothing to tell yet."""
        chunk, out = event.chunk, b""
        if chunk.index not in self._opened:
            self._opened.add(chunk.index)
            out = self._event(_choice(chunk.index, Delta(role="assistant", content="")), tally)
        logprobs = chat_logprobs(chunk.logprobs) if self._logprobs and chunk.logprobs else None
        if chunk.text or logprobs:
            choice = ChatDeltaChoice(
                index=chunk.index,
                delta=Delta(content=chunk.text),
                logprobs=logprobs,
                finish_reason=None,
            )
            out += self._event([choice], tally)
        if chunk.finish is not None:
            out += self._event(_choice(chunk.index, Delta(), finish_name(chunk.finish)), tally)
        return out

    def end(self, tally: Tally) -> bytes:
        """Return what follows the last token: usage, where asked for."""
        return self._event([], tally, usage=tally.usage()) if self._usage.at_end else b""

    def _event(
        self,
        choices: Sequence[ChatDeltaChoice],
        tally: Tally,
        usage: Usage | UnsetType | None = UNSET,
    ) -> bytes:
        head = self._head
        return sse(
            ChatDeltaReply(
                id=head.id,
                object="chat.completion.chunk",
                created=head.created,
                model=head.model,
                choices=list(choices),
                usage=self._usage.of_event(tally) if usage is UNSET else usage,
            )
        )


def _choice(index: int, delta: Delta, finish: str | None = None) -> list[ChatDeltaChoice]:
    return [ChatDeltaChoice(index=index, delta=delta, logprobs=None, finish_reason=finish)]
