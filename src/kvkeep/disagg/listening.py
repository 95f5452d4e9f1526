"""What processes of this machine listen at, read from /proc: bindings are checked, not trusted."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from kvkeep.errors import ConfigError

PROC: Final = Path("/proc")
_LISTEN: Final = "0A"


def exposed(pids: Iterable[int]) -> list[str]:
    """Return the TCP addresses beyond loopback at which these processes listen.

    Raises `ConfigError` where that can't be told: what is not seen may be open to all.
    """
    try:
        inodes = {inode for pid in pids for inode in _sockets(pid)}
        found = [address for inode, address in _listeners() if inode in inodes]
    except OSError as error:
        raise ConfigError(
            f"cluster: can't read {error.filename} ({error.strerror}), so nothing tells what"
            " listens beyond this machine; run as the user that owns Ray's processes, with"
            " /proc mounted"
        ) from None
    return sorted(address for address in found if not _is_loopback(address))


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found, ahead = [], [pid]
    while ahead:
        found.append(ahead.pop())
        ahead += children.get(found[-1], [])
    return found


def _parent(entry: Path) -> int | None:
    try:
        stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return None
    return int(stat.rpartition(")")[2].split()[1])


def _sockets(pid: int) -> set[str]:
    """Return the inodes of a process's sockets; none of one that has ended."""
    found = set()
    try:
        for entry in (PROC / str(pid) / "fd").iterdir():
            target = _target(entry)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return found


def _target(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except FileNotFoundError:  # closed meanwhile
        return ""


def _listeners() -> Iterable[tuple[str, str]]:
    """Yield (inode, HOST:PORT) of each listening TCP socket."""
    for name in ("tcp", "tcp6"):
        table = PROC / "net" / name
        if name == "tcp6" and not table.exists():
            continue  # a kernel without IPv6
        for fields in (line.split() for line in table.read_text("ascii").splitlines()[1:]):
            if fields[3] == _LISTEN:
                host, _, port = fields[1].partition(":")
                yield fields[9], f"{_host(host)}:{int(port, 16)}"


def _host(raw: str) -> str:
    """Return an address of /proc: words of four bytes, each in this machine's order."""
    words = bytes.fromhex(raw)
    packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.rpartition(":")[0]).is_loopback
