"""The curriculum: what each stage trains on, the gate that ends it and its token limit."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("copy", "text", "table", "recall", "chat")


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of batch: rows of `length` tokens, sample kinds by share.

    Copies draw from a vocabulary of `copy_vocab` tokens, each from a random subset of at least
    `copy_smallest` of them. Rows over 128 tokens ask the share `asked` of
    their facts at the end; in a share `crowded` of the rows many facts are about the same few.
    """

    length: int
    tokens: int
    mix: dict[str, float]
    facts: tuple[int, int] = (2, 4)
    copy_vocab: int = 2048
    copy_smallest: int = 8
    asked: float = 0.5
    crowded: float = 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Ends when the running accuracies reach the gate; a stage of fixed length ends at `limit`."""

    name: str
    parts: tuple[Part, ...]
    gate: dict[str, float]
    limit: int
    fixed: bool = False
    least_steps: int = field(default=60)


def _stage(name: str, part: Part, gate: dict[str, float], limit: float) -> Stage:
    return Stage(name, (part,), gate, int(limit))


ONLY_COPY = {"copy": 1.0}
SHORT = {"copy": 0.45, "text": 0.05, "table": 0.17, "recall": 0.18, "chat": 0.15}
QUARTER = {"copy": 0.22, "text": 0.1, "table": 0.16, "recall": 0.27, "chat": 0.25}
HALF = {"copy": 0.1, "text": 0.2, "table": 0.16, "recall": 0.29, "chat": 0.25}
LONG = {"copy": 0.08, "text": 0.2, "table": 0.12, "recall": 0.3, "chat": 0.3}
POLISH_SHORT = {"copy": 0.05, "text": 0.65, "table": 0.05, "recall": 0.1, "chat": 0.15}
LAST = {"copy": 0.06, "text": 0.14, "table": 0.12, "recall": 0.33, "chat": 0.35}
POLISH_LONG = {"copy": 0.12, "text": 0.1, "table": 0.1, "recall": 0.33, "chat": 0.35}

STAGES = (
    _stage("copy 256", Part(64, 4096, ONLY_COPY, (2, 4), 256, 256), {"copy": 0.9}, 3e6),
    _stage("copy all", Part(64, 4096, ONLY_COPY, (2, 4), 2048, 32), {"copy": 0.85}, 2e6),
    _stage(
        "128",
        Part(128, 4096, SHORT, (2, 4), 2048, 16),
        {"table": 0.95, "recall": 0.9, "chat": 0.9},
        3e6,
    ),
    _stage(
        "256",
        Part(256, 4096, QUARTER, (3, 8)),
        {"table": 0.95, "recall": 0.93, "chat": 0.93},
        3e6,
    ),
    _stage(
        "512",
        Part(512, 8192, HALF, (4, 16)),
        {"table": 0.95, "recall": 0.95, "chat": 0.95},
        3e6,
    ),
    _stage(
        "1024",
        Part(1024, 8192, HALF, (6, 24)),
        {"table": 0.95, "recall": 0.95, "chat": 0.95},
        2.5e6,
    ),
    _stage(
        "2048",
        Part(2048, 8192, LONG, (8, 24)),
        {"table": 0.95, "recall": 0.95, "chat": 0.95},
        2.5e6,
    ),
    Stage(
        "polish",
        (Part(512, 8192, POLISH_SHORT, (4, 16)), Part(2048, 8192, POLISH_LONG, (8, 24))),
        {"table": 0.97, "recall": 0.98, "chat": 0.98},
        3_300_000,
        fixed=True,
    ),
    Stage(
        "polish 2048",
        (
            Part(2048, 8192, LAST, (8, 24), asked=1.0, crowded=0.3),
            Part(2048, 8192, LAST, (8, 24), crowded=0.3),
        ),
        {"table": 0.98, "recall": 0.98, "chat": 0.98},
        3_000_000,
        fixed=True,
    ),
)
