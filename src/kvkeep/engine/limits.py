"""How much one step may hold, and how many sequences may run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvkeep.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much one step may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    chunk_tokens: int = 256
    """Prefill is cut at absolute multiples of this."""
    coded: bool = False
    """Whether pages are coded: then no more sequences run than there are staged pages for."""

    def caps(self, shares: Mapping[str, float]) -> dict[str, int]:
        """Return how many sequences of each tenant may run at a time.

        Raises `ConfigError` where pages are coded and fewer could.
        """
        most = self.max_num_seqs
        caps = {name: max(1, int(most * share)) for name, share in shares.items()}
        if self.coded and sum(caps.values()) > most:
            raise ConfigError(
                f"max_num_seqs: {len(caps)} tenants run up to {sum(caps.values())} sequences, and"
                f" recent tokens are kept for {most}; raise it"
            )
        return caps
