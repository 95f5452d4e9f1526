"""Attacks on stolen pages: which tokens rows of keys and values give away, with public weights.

Numpy alone, nothing of the engine: what is found here anybody can find.
"""

from kvkeep.audit.stolen.attacks import ATTACKS
from kvkeep.audit.stolen.public import PublicModel, open_public
from kvkeep.audit.stolen.rows import Stolen, read_stolen
from kvkeep.audit.stolen.run import Finding, Report, attack_rows

__all__ = [
    "ATTACKS",
    "Finding",
    "PublicModel",
    "Report",
    "Stolen",
    "attack_rows",
    "open_public",
    "read_stolen",
]
