"""The held-out world: what the detector is judged by.

Committed before any training and not changed after a result was seen; the training world
shares no template and no value with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tools.detector_data.passages import World

SEED: Final = 7_401_553


def world() -> World:
    """Return the held-out world."""
    return World.read(Path(__file__).parent, SEED)
