"""What is sooner there, sent or computed: from what an operator says of machines, never load."""

from __future__ import annotations

from typing import Final

import msgspec

GIGABIT_BYTES: Final = 1e9 / 8


class Speeds(msgspec.Struct, frozen=True, kw_only=True):
    """Of the network between workers, and of the workers on it."""

    link_bytes_per_s: float
    token_s: float
    """A worker's time for a token of a prompt."""

    def rows_pay(self, prompt: int, rows: int, pages_bytes: float, rows_bytes: float) -> bool:
        """Tell whether a prompt's last `rows` are there as soon sent as computed a second time.

        Both come behind the prompt's pages, on a link that nothing else uses; what is sent while
        the prompt is computed takes no time.
        """
        computed_s = prompt * self.token_s
        sent_s = (pages_bytes + rows_bytes) / self.link_bytes_per_s
        pages_s = max(computed_s, pages_bytes / self.link_bytes_per_s)
        return max(computed_s, sent_s) <= pages_s + rows * self.token_s
