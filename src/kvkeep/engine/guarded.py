"""What is said about a tenant's guard, where it is not kept in the engine that answers."""

from __future__ import annotations

import msgspec


class Guarded(msgspec.Struct, frozen=True, kw_only=True):
    """What whoever leads a cluster's workers says of a request's guard."""

    steps_back: int = 0
    """That its tenant has taken: every worker of the request stores its pages accordingly."""
    number: int = 0
    """Of its tenant's requests."""
    sampled: bool = False
    """Whether it is to carry a shadow; what that says is told in a `Verdict`."""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What one shadow, a request's or that of a probe beside it, has said."""

    compared: int
    agreed: int
    recalled: int
    forgotten: int
    kl_nats: float
    probe: bool = False


class GuardUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the shadows of one tenant's requests have said, for the admin port only."""

    tenant: str
    shadowed: int
    """Requests that were compared with their shadow."""
    unshadowed: int
    """Requests that were drawn and not: too large, ended by their client, or with nothing to lose.
    """
    compared_tokens: int
    agreed_tokens: int
    """Of these, those whose most likely next token was the same."""
    recalled_tokens: int = 0
    """Tokens planted behind prompts that shadows told."""
    forgotten_tokens: int = 0
    """Of these, those that were not told without the whole cache."""
    kl_nats: float
    """Summed over the compared tokens."""
    steps_back: int
