"""What an engine has below memory: tiers as the options ask for them, and what seals pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvkeep.cache.tier.files import Directory
from kvkeep.cache.tier.pages import TieredPages, TierSizes
from kvkeep.cache.tier.segments import SPARE
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import sealing_of
from kvkeep.errors import ConfigError

_UNITS: Final = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB)")
LEAST_BYTES: Final = 1 << 20
ORDER: Final = 1
"""Of how kernels and codecs arrange and compute a page's bytes; a change makes old pages misses."""
_FORMS: Final = "use memory:4GiB or disk:DIR,64GiB"


def sizes_of(tiers: Sequence[str]) -> tuple[TierSizes, Path | None]:
    """Return the sizes that `--tier` asks for and the disk's directory; raises `ConfigError`."""
    memory = disk = 0
    directory: Path | None = None
    for text in tiers:
        kind, _, rest = text.partition(":")
        if kind == "memory" and not memory:
            memory = _size_of(text, rest)
        elif kind == "disk" and directory is None:
            path, _, size = rest.rpartition(",")
            if not path:
                raise ConfigError(f"tier: {text!r} names no directory; {_FORMS}")
            directory, disk = Path(path), _size_of(text, size)
        elif kind in {"memory", "disk"}:
            raise ConfigError(f"tier: {kind!r} is named twice; give one of each kind")
        else:
            raise ConfigError(f"tier: {text!r} is of no known kind; {_FORMS}")
    return TierSizes(memory, disk), directory


def order_of(options: EngineOptions, *parts: str) -> bytes:
    """Return what decides a page's bytes beside its spec: the build, and `parts`."""
    return "|".join((f"{ORDER}", options.device, options.weights, *parts)).encode()


def tier_of(options: EngineOptions, page_bytes: int) -> TieredPages | None:
    """Return the tiers asked for, asleep, to hold pages of up to so many bytes.

    Raises `ConfigError`.
    """
    if not options.tiers:
        return None
    if not options.prefix_caching:
        raise ConfigError("tier: holds pages for later requests; leave prefix_caching on")
    sizes, path = sizes_of(options.tiers)
    _check_size(sizes, page_bytes)
    directory = None if path is None else Directory(path)
    try:
        sealing = sealing_of(options, () if path is None else (path,))
        tier = TieredPages(sealing.sealer, sizes, directory, ended=sealing.close)
    except OSError as error:
        raise ConfigError(f"tier: can't read {path}: {error.strerror}") from None
    tier.asleep = True
    return tier


def _check_size(sizes: TierSizes, page_bytes: int) -> None:
    for kind, size in (("memory", sizes.memory_bytes), ("disk", sizes.disk_bytes * (1 - SPARE))):
        if 0 < size < 2 * page_bytes:
            raise ConfigError(f"tier: {kind} holds no two pages of {page_bytes} bytes; raise it")


def _size_of(text: str, size: str) -> int:
    found = _SIZE.fullmatch(size.strip())
    count = int(float(found[1]) * (1 << _UNITS[found[2]])) if found else 0
    if count < LEAST_BYTES:
        raise ConfigError(f"tier: {text!r} needs a size of 1MiB or more, such as 64GiB; {_FORMS}")
    return count
