"""How many examples a property is tried on: few in `make test`, all in `make nightly`."""

from __future__ import annotations

import os
from typing import Final

AT_LENGTH: Final = "TESTS_AT_LENGTH"
"""Environment variable that the root conftest sets."""


def examples(few: int, all_of_them: int) -> int:
    """Return the number for this run."""
    return all_of_them if os.environ.get(AT_LENGTH) == "1" else few
