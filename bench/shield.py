"""What shields cost and what they are worth: exact transforms, attacks on stolen pages.

`--only` names a part: `transforms` takes decoding steps of engines in turn and the published
method's cost for one token of three models; `attacks` steals pages and counts the tokens that
their rows give away to somebody who has the public weights; `sealing` holds sealed pages of 1 MiB
beside the raw cipher, and shreds tenants; `tile` takes decoding steps whose tiles are opened.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Final

from bench import harness, shield_attacks, shield_seal, shield_tile, shield_transforms
from bench.harness import Cell, Figure, Options, Report, Row
from kvkeep.errors import ConfigError

Part = Callable[[Options], tuple[list[Figure], list[Row]]]
PARTS: Final[dict[str, Part]] = {
    "transforms": shield_transforms.figures,
    "attacks": shield_attacks.figures,
    "sealing": shield_seal.figures,
    "tile": shield_tile.figures,
}


def measure(options: Options) -> Report:
    """Measure every part, or those asked for."""
    for name in options.only:
        if name not in PARTS:
            raise ConfigError(f"only: there is no part {name!r}; there are: {', '.join(PARTS)}")
    figures: list[Figure] = []
    rows: list[Row] = []
    for name in options.only or PARTS:
        own, told = PARTS[name](options)
        figures, rows = [*figures, *own], [*rows, *told]
    params: dict[str, Cell] = {"threads": options.threads, "quick": options.quick}
    return Report("shield", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("shield", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
