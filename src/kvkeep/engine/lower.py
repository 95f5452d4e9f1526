"""What an engine has below memory: tiers as the options ask for them, and what seals pages."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from kvkeep.cache.tier.files import Directory, Files
from kvkeep.cache.tier.frames import Frames
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tier.pages import TieredPages
from kvkeep.cache.tier.segments import SPARE
from kvkeep.cache.tiers import Room, Surroundings
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import mode_of, sealing_of
from kvkeep.errors import ConfigError
from kvkeep.sealing import PageSealer

_UNITS: Final = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB)")
LEAST_BYTES: Final = 1 << 20
SPACE: Final = "*space"
"""Whose shelf tells a key store's frames in a server from others'; no account is called so."""
ORDER: Final = 2
"""Of how kernels and codecs arrange and compute a page's bytes; a change makes old pages misses."""
_FORMS: Final = "use memory:4GiB or disk:DIR,64GiB or redis://HOST:PORT/DB,64GiB"
_REMOTE: Final = ("redis", "rediss")


class Asked(NamedTuple):
    """What `--tier` asks for."""

    sizes: TierSizes
    directory: Path | None = None
    """Of the disk."""
    url: str | None = None
    """Of a Redis or Valkey server."""


def sizes_of(tiers: Sequence[str]) -> Asked:
    """Return the sizes, directory and server that `--tier` asks for; raises `ConfigError`."""
    memory = disk = remote = 0
    directory: Path | None = None
    url: str | None = None
    for text in tiers:
        kind, _, rest = text.partition(":")
        if kind == "memory" and not memory:
            memory = _size_of(text, rest)
        elif kind == "disk" and directory is None:
            path, _, size = rest.rpartition(",")
            if not path:
                raise ConfigError(f"tier: {text!r} names no directory; {_FORMS}")
            directory, disk = Path(path), _size_of(text, size)
        elif kind in _REMOTE and url is None:
            url, _, size = text.rpartition(",")
            if not url:
                raise ConfigError(f"tier: {text!r} needs a size; {_FORMS}")
            remote = _size_of(text, size)
        elif kind in {"memory", "disk", *_REMOTE}:
            raise ConfigError(f"tier: {kind!r} is named twice; give one of each kind")
        else:
            raise ConfigError(f"tier: {text!r} is of no known kind; {_FORMS}")
    return Asked(TierSizes(memory, disk, remote), directory, url)


def order_of(options: EngineOptions, *parts: str) -> bytes:
    """Return what decides a page's bytes beside its spec: the build, and `parts`."""
    return "|".join((f"{ORDER}", options.device, options.weights, *parts)).encode()


def tier_of(
    options: EngineOptions, page_bytes: int, files: Callable[[Path], Files] = Directory
) -> TieredPages | None:
    """Return the tiers asked for, asleep, to hold pages of up to so many bytes.

    `files` opens the disk's directory. Raises `ConfigError`.
    """
    if not options.tiers:
        return None
    if not options.prefix_caching:
        raise ConfigError("tier: holds pages for later requests; leave prefix_caching on")
    sizes, path, url = sizes_of(options.tiers)
    _check_size(sizes, page_bytes)
    if url is not None and mode_of(options) == "off":
        raise ConfigError("tier: a server gets sealed pages alone; leave shield off out")
    directory = None if path is None else files(path)
    try:
        sealing = sealing_of(options, () if path is None else (path,))
        remote = None if url is None else _remote(url, sealing.sealer)
        tier = TieredPages(
            sealing.sealer,
            sizes,
            directory,
            ended=sealing.close,
            look=lambda: Surroundings(None if path is None else room_in(path), sealing.keys()),
            remote=remote,
            wipes=options.shield == "tile",
        )
    except OSError as error:
        raise ConfigError(f"tier: can't read {path}: {error.strerror}") from None
    tier.asleep = True
    return tier


def room_in(path: Path) -> Room | None:
    """Return what the file system of a folder, there yet or not, has left; None: can't tell."""
    there = next((one for one in (path, *path.absolute().parents) if one.is_dir()), path)
    try:
        found = os.statvfs(there)
    except OSError:
        return None
    read_only = bool(found.f_flag & os.ST_RDONLY) or not os.access(there, os.W_OK)
    return Room(found.f_bavail * found.f_frsize, read_only)


def _remote(url: str, sealer: PageSealer) -> Frames:
    """Return the frames in a server; raises `ConfigError` where it can't be asked."""
    try:
        from kvkeep.cache.tier.remote import RemoteFrames, client_of  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            f"tier: a server needs the package {error.name}; install kvkeep[redis]"
        ) from None
    space = sealer.shelf_of(SPACE)
    if space is None:
        raise ConfigError("tier: the key process gives no keys out; look at shield_keys")
    return RemoteFrames(client_of(url), space)


def _check_size(sizes: TierSizes, page_bytes: int) -> None:
    usable = sizes.disk_bytes * (1 - SPARE)
    for kind, size in (
        ("memory", sizes.memory_bytes),
        ("disk", usable),
        ("redis", sizes.remote_bytes),
    ):
        if 0 < size < 2 * page_bytes:
            raise ConfigError(f"tier: {kind} holds no two pages of {page_bytes} bytes; raise it")


def _size_of(text: str, size: str) -> int:
    found = _SIZE.fullmatch(size.strip())
    count = int(float(found[1]) * (1 << _UNITS[found[2]])) if found else 0
    if count < LEAST_BYTES:
        raise ConfigError(f"tier: {text!r} needs a size of 1MiB or more, such as 64GiB; {_FORMS}")
    return count
