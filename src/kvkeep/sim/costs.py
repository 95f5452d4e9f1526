"""What steps cost on a machine, as measured there: the simulator's only knowledge of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from kvkeep.errors import ConfigError
from kvkeep.types import PAGE_TOKENS


class CodecCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A codec's bytes and times."""

    bytes_per_token: float
    """Of closed pages."""
    context_s_per_token: float
    """A decode step's time for each token of context of each row."""
    encode_s_per_token: float = 0.0
    decode_s_per_token: float = 0.0
    """Of widening what arrived, where a codec's pages can't be attended to as they are."""
    window_tokens: int = 0
    """Recent tokens that stay in 16 bits, at most."""
    block_tokens: int = 0
    """Whole blocks of so many tokens are handed over in this form, and what is left of a prompt in
    16 bits; 0: by pages, and `window_tokens` in 16 bits.
    """


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of a worker's steps, by least squares over measured ones."""

    source: str
    """Machine, model, date and command of what was measured."""
    bytes_per_token: float
    """Of keys and values in 16 bits."""
    chunk_s: float
    """Of a chunk of a prompt, whatever its length."""
    prefill_s_per_token: float
    prefill_s_per_token_pair: float
    """For each pair of a computed token and one before it."""
    step_s: float
    """Of a decode step, whatever its rows."""
    row_s: float
    codecs: dict[str, CodecCosts]
    handover_s: float = 0.0
    """From a prompt's last byte to the first step that can hold its request."""

    def chunk_time_s(self, tokens: int, context: int) -> float:
        """Return the time of `tokens` of a prompt behind `context` others, encoding aside."""
        pairs = tokens * (context + tokens / 2)
        return (
            self.chunk_s + self.prefill_s_per_token * tokens + self.prefill_s_per_token_pair * pairs
        )

    def step_time_s(self, codec: str, rows: int, context: float) -> float:
        """Return the time of a decode step over rows with `context` tokens in all."""
        return self.step_s + self.row_s * rows + self.codecs[codec].context_s_per_token * context

    def held_bytes(self, codec: str, tokens: int) -> float:
        """Return the bytes of a request's keys and values, recent ones in 16 bits."""
        one = self.codecs[codec]
        closed = max(0, tokens - one.window_tokens) // PAGE_TOKENS * PAGE_TOKENS
        return closed * one.bytes_per_token + (tokens - closed) * self.bytes_per_token

    def sent_bytes(self, codec: str, tokens: int) -> float:
        """Return the bytes of a prompt that are handed over."""
        one = self.codecs[codec]
        if not one.block_tokens:
            return self.held_bytes(codec, tokens)
        rest = tokens % one.block_tokens
        return (tokens - rest) * one.bytes_per_token + rest * self.bytes_per_token


def load_costs(path: Path) -> Costs:
    """Return costs from a JSON file; raises `ConfigError` naming the field."""
    try:
        costs = msgspec.json.decode(path.read_bytes(), type=Costs)
    except OSError as error:
        raise ConfigError(f"costs: can't read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"costs: {path}: {error}") from None
    if not costs.codecs:
        raise ConfigError(f"costs: {path} names no codec; measure one at least")
    numbers = {**_numbers("", costs)}
    for name, codec in costs.codecs.items():
        numbers |= _numbers(f"codecs.{name}.", codec)
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"costs: {path}: {name} is {value}; it must be 0 or more")
    return costs


def _numbers(prefix: str, struct: msgspec.Struct) -> dict[str, float]:
    fields = msgspec.structs.asdict(struct).items()
    return {prefix + name: value for name, value in fields if isinstance(value, int | float)}


class Chunk(NamedTuple):
    """A measured chunk of a prompt, or several that follow one another."""

    tokens: int
    context: int
    took_s: float
    chunks: int = 1


class Step(NamedTuple):
    """A measured decode step."""

    rows: int
    context: int
    took_s: float


class PrefillFit(NamedTuple):
    """Of `chunk_s`, `prefill_s_per_token`, `prefill_s_per_token_pair`."""

    chunk_s: float
    token_s: float
    pair_s: float


class StepFit(NamedTuple):
    """Of `step_s`, `row_s` and one `context_s_per_token` for each codec."""

    step_s: float
    row_s: float
    context_s: Mapping[str, float]


def fit_prefill(chunks: Sequence[Chunk]) -> PrefillFit:
    """Fit chunks of several lengths behind several contexts; none of the parts is below 0."""
    rows = [(c.chunks, c.tokens, c.tokens * (c.context + c.tokens / 2)) for c in chunks]
    return PrefillFit(*_fit(rows, [c.took_s for c in chunks]))


def fit_steps(steps: Mapping[str, Sequence[Step]]) -> StepFit:
    """Fit the steps of all codecs at once: what doesn't read the cache is the same for all."""
    names = [*steps]
    rows, took = [], []
    for at, name in enumerate(names):
        for step in steps[name]:
            contexts = [0.0] * len(names)
            contexts[at] = step.context
            rows.append((1.0, step.rows, *contexts))
            took.append(step.took_s)
    step_s, row_s, *context_s = _fit(rows, took)
    return StepFit(step_s, row_s, dict(zip(names, context_s, strict=True)))


def _fit(rows: Sequence[Sequence[float]], took_s: Sequence[float]) -> list[float]:
    """Return non-negative factors by least squares of the relative error.

    A factor that would be below 0 is left out, the most negative first.
    """
    table, took = np.array(rows, float), np.array(took_s, float)
    if len(took) < table.shape[1]:
        raise ConfigError(f"costs: {len(took)} steps do not fix {table.shape[1]} factors")
    weighted = table / took[:, None]
    kept, found = list(range(table.shape[1])), np.zeros(table.shape[1])
    while kept:
        factors, *_ = np.linalg.lstsq(weighted[:, kept], np.ones(len(took)), rcond=None)
        if factors.min() >= 0:
            found[kept] = factors
            break
        del kept[int(factors.argmin())]
    return found.tolist()
