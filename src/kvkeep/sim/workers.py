"""A worker's time: prompts in chunks, one after another, and decode steps of all its rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field

import simpy

from kvkeep.sim.costs import Costs

Steps = Generator[simpy.Event, None, None]


@dataclass(slots=True)
class Prompt:
    """A prompt to compute; `computed` fires with its last token."""

    left_tokens: int
    context: int
    """Tokens before it that the worker holds."""
    computed: simpy.Event
    begun_s: float = -1.0
    encode_s: float = 0.0


@dataclass(slots=True)
class Row:
    """An answer to decode; `ended` fires with its last token."""

    left_tokens: int
    context: int
    held_bytes: float
    """When its last token is decoded."""
    ended: simpy.Event
    begun_s: float = -1.0


@dataclass(frozen=True, slots=True)
class Size:
    """What a worker can do at a time."""

    chunk_tokens: int = 512
    max_rows: int = 64
    memory_bytes: float = float("inf")
    """For the keys and values of rows."""


@dataclass(slots=True)
class Worker:
    """One engine: a chunk of the oldest prompt and a token of every row make a step.

    Without prompts it decodes on until a row ends or another comes, in one event.
    """

    env: simpy.Environment
    costs: Costs
    codec: str
    size: Size
    queued_tokens: int = 0
    busy_s: float = 0.0
    _prompts: deque[Prompt] = field(default_factory=deque)
    _waiting: deque[Row] = field(default_factory=deque)
    _rows: list[Row] = field(default_factory=list)
    _room_bytes: float = 0.0
    _woken: simpy.Event | None = None

    def start(self) -> None:
        """Begin to work."""
        self._room_bytes = self.size.memory_bytes
        self.env.process(self._run())

    def compute(self, tokens: int, context: int) -> Prompt:
        """Queue a prompt."""
        prompt = Prompt(tokens, context, self.env.event())
        self.queued_tokens += tokens
        self._prompts.append(prompt)
        self._wake()
        return prompt

    def decode(self, tokens: int, context: int) -> Row:
        """Queue the answer to a prompt whose keys and values are here."""
        held = self.costs.held_bytes(self.codec, context + tokens)
        row = Row(tokens, context, held, self.env.event())
        self._waiting.append(row)
        self._wake()
        return row

    @property
    def rows(self) -> int:
        """Return the answers that are decoded or wait for it."""
        return len(self._rows) + len(self._waiting)

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.triggered:
            self._woken.succeed()

    def _run(self) -> Steps:
        while True:
            self._admit()
            if not self._prompts and not self._rows:
                self._woken = self.env.event()
                yield self._woken
            elif self._prompts:
                yield from self._mixed_step()
            else:
                yield from self._decode_on()

    def _admit(self) -> None:
        """Take waiting rows in their order while there is room; one alone is always taken."""
        while self._waiting and len(self._rows) < self.size.max_rows:
            row = self._waiting[0]
            if self._rows and row.held_bytes > self._room_bytes:
                return
            self._room_bytes -= row.held_bytes
            row.begun_s = self.env.now
            self._rows.append(self._waiting.popleft())

    def _mixed_step(self) -> Steps:
        prompt = self._prompts[0]
        if prompt.begun_s < 0:
            prompt.begun_s = self.env.now
        tokens = min(prompt.left_tokens, self.size.chunk_tokens)
        encode_s = self.costs.codecs[self.codec].encode_s_per_token * tokens
        prompt.encode_s += encode_s
        chunk_s = self.costs.chunk_time_s(tokens, prompt.context) + encode_s
        step_s = self._step_s(1) if self._rows else 0.0
        yield self._work(chunk_s + step_s)
        self._advance(1)
        prompt.left_tokens -= tokens
        prompt.context += tokens
        self.queued_tokens -= tokens
        if prompt.left_tokens == 0:
            self._prompts.popleft()
            prompt.computed.succeed()

    def _decode_on(self) -> Steps:
        steps = min(row.left_tokens for row in self._rows)
        step_s = self._step_s(steps)
        begun = self.env.now
        self._woken = self.env.event()
        yield self.env.timeout(steps * step_s) | self._woken
        if self._woken.triggered:
            elapsed = (self.env.now - begun) / step_s
            steps = min(steps, int(elapsed) + 1)
            yield self.env.timeout(max(0.0, (steps - elapsed) * step_s))
        self.busy_s += steps * step_s
        self._advance(steps)

    def _step_s(self, steps: int) -> float:
        """Return the mean time of the next steps, whose contexts grow."""
        rows = len(self._rows)
        context = sum(row.context for row in self._rows) + rows * (steps - 1) / 2
        return self.costs.step_time_s(self.codec, rows, context)

    def _work(self, seconds: float) -> simpy.Timeout:
        self.busy_s += seconds
        return self.env.timeout(seconds)

    def _advance(self, steps: int) -> None:
        going = []
        for row in self._rows:
            row.left_tokens -= steps
            row.context += steps
            if row.left_tokens > 0:
                going.append(row)
            else:
                self._room_bytes += row.held_bytes
                row.ended.succeed()
        self._rows = going
