"""Turns what the engine says into text completions, whole or as events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UnsetType

from kvkeep.engine.api import TokenLogprob
from kvkeep.server.generation import Event
from kvkeep.server.replies import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    Head,
    Tally,
    Usage,
    finish_name,
    finite,
)
from kvkeep.server.streaming import UsageMode, sse


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt to be repeated before its completion."""

    text: str
    first_token: str
    """The prompt's first token has no log-probability, but a text."""


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """How the completions of one request are laid out."""

    n: int
    logprobs: bool
    echoes: tuple[Echo, ...] = ()
    """One per prompt; empty where nothing is echoed."""
    prompt_only: bool = False
    """`max_tokens` = 0: the one generated token is dropped."""


class _Writer:
    """Renders the pieces of one sequence: its echo first, then what was generated."""

    def __init__(self, shape: CompletionShape, prompt: int) -> None:
        self._shape = shape
        self._echo = shape.echoes[prompt] if shape.echoes else None
        self._offset = 0
        self._opened = False

    def piece(
        self, event: Event, scored: Sequence[TokenLogprob | None]
    ) -> tuple[str, CompletionLogprobs | None]:
        """Return the new text and its log-probabilities; `scored` are the prompt's."""
        logprobs = CompletionLogprobs() if self._shape.logprobs else None
        text = ""
        if not self._opened:
            self._opened = True
            if self._echo is not None:
                text = self._echo.text
                if logprobs is not None:
                    self._score(logprobs, scored, self._echo.first_token)
        if not self._shape.prompt_only:
            text += event.chunk.text
            if logprobs is not None:
                self._score(logprobs, event.chunk.logprobs, "")
        return text, logprobs

    def _score(
        self, out: CompletionLogprobs, tokens: Sequence[TokenLogprob | None], unscored: str
    ) -> None:
        for token in tokens:
            text = unscored if token is None else token.text
            out.tokens.append(text)
            out.text_offset.append(self._offset)
            out.token_logprobs.append(None if token is None else finite(token.logprob))
            out.top_logprobs.append(None if token is None else _top(token))
            self._offset += len(text)


class _Writers:
    """The writers of all sequences, and the prompts' log-probabilities once they are known."""

    def __init__(self, shape: CompletionShape) -> None:
        self._shape = shape
        self._writers: dict[int, _Writer] = {}
        self._scored: dict[int, Sequence[TokenLogprob | None]] = {}

    def piece(self, event: Event) -> tuple[int, str, CompletionLogprobs | None]:
        """Return the choice's index with its new text and log-probabilities."""
        if event.chunk.prompt_logprobs is not None:
            self._scored[event.prompt] = event.chunk.prompt_logprobs
        index = event.prompt * self._shape.n + event.chunk.index
        writer = self._writers.setdefault(index, _Writer(self._shape, event.prompt))
        return index, *writer.piece(event, self._scored.get(event.prompt, ()))


@dataclass(slots=True)
class _Completion:
    texts: list[str] = field(default_factory=list)
    logprobs: CompletionLogprobs = field(default_factory=CompletionLogprobs)
    finish: str = "stop"
    stop_match: str | int | None = None


class CompletionAnswer:
    """Collects all sequences of all prompts into one reply."""

    def __init__(self, head: Head, shape: CompletionShape, prompts: int) -> None:
        self._head = head
        self._shape = shape
        self._writers = _Writers(shape)
        self._choices = [_Completion() for _ in range(prompts * shape.n)]

    def add(self, event: Event) -> None:
        """Take what is new."""
        index, text, logprobs = self._writers.piece(event)
        choice = self._choices[index]
        choice.texts.append(text)
        if logprobs is not None:
            choice.logprobs.tokens += logprobs.tokens
            choice.logprobs.text_offset += logprobs.text_offset
            choice.logprobs.token_logprobs += logprobs.token_logprobs
            choice.logprobs.top_logprobs += logprobs.top_logprobs
        if event.chunk.finish is not None:
            choice.finish, choice.stop_match = (
                finish_name(event.chunk.finish),
                event.chunk.stop_match,
            )

    def json(self, tally: Tally) -> bytes:
        """Return the whole reply."""
        choices = [
            CompletionChoice(
                index=i,
                text="".join(c.texts),
                logprobs=c.logprobs if self._shape.logprobs else None,
                finish_reason=c.finish,
                stop_reason=c.stop_match,
            )
            for i, c in enumerate(self._choices)
        ]
        return msgspec.json.encode(_reply(self._head, choices, tally.usage()))


class CompletionEvents:
    """Renders each chunk as a server-sent event."""

    def __init__(self, head: Head, shape: CompletionShape, usage: UsageMode) -> None:
        self._head = head
        self._writers = _Writers(shape)
        self._usage = usage

    def render(self, event: Event, tally: Tally) -> bytes:
        """Return the event of one chunk; empty where there is nothing to tell yet."""
        finish = None if event.chunk.finish is None else finish_name(event.chunk.finish)
        index, text, logprobs = self._writers.piece(event)
        if not text and finish is None and not (logprobs and logprobs.tokens):
            return b""
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)
        return sse(_reply(self._head, [choice], self._usage.of_event(tally)))

    def end(self, tally: Tally) -> bytes:
        """Return what follows the last token: usage, where asked for."""
        return sse(_reply(self._head, [], tally.usage())) if self._usage.at_end else b""


def _reply(
    head: Head, choices: list[CompletionChoice], usage: Usage | UnsetType | None
) -> CompletionReply:
    return CompletionReply(
        id=head.id,
        object="text_completion",
        created=head.created,
        model=head.model,
        choices=choices,
        usage=usage,
    )


def _top(token: TokenLogprob) -> dict[str, float]:
    """Return the best log-probability of each text, the chosen token's among them."""
    top: dict[str, float] = {}
    for _, text, logprob in token.top:
        top.setdefault(text, finite(logprob))
    top.setdefault(token.text, finite(token.logprob))
    return top
