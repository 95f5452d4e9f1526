"""Memory for keys that other processes, dumps and swap do not see, and what holds on a machine."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvkeep.environment import environment
from kvkeep.errors import KeysUnavailable
from kvkeep.shield.envelope import KEY_BYTES

RegionKind = Literal["memfd_secret", "mlock", "unlocked"]

_MEMFD_SECRET = 447
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_MADV_DONTFORK, _MADV_DONTDUMP = 10, 16
_M_PERTURB, _PERTURB = -6, 0xA5
_TUNABLES, _NOTHING_AT_HAND = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"
_MAP_FAILED = ctypes.c_void_p(-1).value

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class SecretRegion:
    """Slots of 32 bytes: in `memfd_secret` memory, else in locked memory kept out of dumps.

    `memfd_secret` memory is unmapped from the kernel's own view: `/proc/PID/mem` and
    `process_vm_readv` fail on it, for root too. Its descriptor is closed once it is mapped.
    """

    def __init__(self, slots: int, *, secret: bool = True) -> None:
        self.num_bytes = -(-slots * KEY_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self.address, self.kind = _map(self.num_bytes, secret=secret)
        self._view = memoryview((ctypes.c_char * self.num_bytes).from_address(self.address)).cast(
            "B"
        )
        self._free = list(range(slots))
        self._taking = threading.Lock()

    @property
    def free_slots(self) -> int:
        """Return how many slots are not taken."""
        return len(self._free)

    def take(self) -> int:
        """Return a slot of zeros; raises `KeysUnavailable` where all are taken."""
        with self._taking:
            if not self._free:
                raise KeysUnavailable("key memory is used up; raise RLIMIT_MEMLOCK")
            return self._free.pop()

    def view(self, slot: int) -> memoryview:
        """Return a slot's 32 bytes, writable."""
        return self._view[slot * KEY_BYTES : (slot + 1) * KEY_BYTES]

    def random(self) -> int:
        """Return a slot of random bytes, which no other memory of this process ever held."""
        slot = self.take()
        fill_random(self.view(slot))
        return slot

    def give(self, slot: int) -> None:
        """Zero a slot and take it back."""
        self.view(slot)[:] = bytes(KEY_BYTES)
        with self._taking:
            self._free.append(slot)

    def close(self) -> None:
        """Zero and unmap everything."""
        self._view[:] = bytes(self.num_bytes)
        self._view.release()
        _LIBC.munmap(self.address, self.num_bytes)


def fill_random(view: memoryview) -> None:
    """Fill memory with random bytes, straight from the kernel."""
    with Path("/dev/urandom").open("rb", buffering=0) as source:
        source.readinto(view)


def _map(size: int, *, secret: bool) -> tuple[int, RegionKind]:
    """Return mapped memory's address and how it is kept from others."""
    both = mmap.PROT_READ | mmap.PROT_WRITE
    handle = _LIBC.syscall(_MEMFD_SECRET, os.O_CLOEXEC) if secret else -1
    if handle >= 0:
        try:
            os.ftruncate(handle, size)
            address = _LIBC.mmap(None, size, both, mmap.MAP_SHARED, handle, 0)
        finally:
            os.close(handle)
        if address != _MAP_FAILED:
            _LIBC.madvise(address, size, _MADV_DONTFORK)
            return int(address), "memfd_secret"
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _LIBC.mmap(None, size, both, flags, -1, 0)
    if address == _MAP_FAILED:
        raise KeysUnavailable("no memory for keys can be mapped")
    for advice in (_MADV_DONTFORK, _MADV_DONTDUMP):
        _LIBC.madvise(address, size, advice)
    return int(address), "mlock" if _LIBC.mlock(address, size) == 0 else "unlocked"


def lock(address: int, size: int) -> bool:
    """Keep memory that begins at a page out of swap and dumps; False where it may be swapped."""
    _LIBC.madvise(address, size, _MADV_DONTDUMP)
    return bool(_LIBC.mlock(address, size) == 0)


def overwrite_freed(*, wanted: bool = True) -> None:
    """Let the C library overwrite memory as it is freed, small pieces it keeps at hand aside."""
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_PERTURB, _PERTURB if wanted else 0)


@contextmanager
def overwriting_children() -> Iterator[None]:
    """Let processes that are started meanwhile overwrite all memory that they free."""
    tunables = (os.environ.get(_TUNABLES), f"glibc.malloc.perturb={_PERTURB}", _NOTHING_AT_HAND)
    wanted = {_TUNABLES: ":".join(filter(None, tunables)), "PYTHONMALLOC": "malloc"}
    with environment(wanted):
        yield


def forbid_dumps() -> None:
    """Let no core of this process be written and no process of the same user attach to it."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def dumpable() -> bool:
    """Tell whether cores of this process may be written and its user may attach to it."""
    return bool(_LIBC.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1)


@dataclass(frozen=True, slots=True)
class Hygiene:
    """What keeps keys and pages out of other hands on this machine."""

    key_memory: RegionKind
    swap: bool
    core_limit_bytes: int
    attestation: bool
    locked_bytes: int | None
    """That a process may lock; None: as much as it likes."""


def look(proc: Path = Path("/proc"), config: Path = Path("/sys/kernel/config")) -> Hygiene:
    """Return what holds on this machine."""
    region = SecretRegion(1)
    region.close()
    swaps = proc / "swaps"
    most, privileged = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], os.geteuid() == 0
    listed = swaps.read_text(encoding="utf-8").splitlines()[1:] if swaps.exists() else []
    return Hygiene(
        key_memory=region.kind,
        swap=bool(listed),
        core_limit_bytes=resource.getrlimit(resource.RLIMIT_CORE)[0],
        attestation=(config / "tsm" / "report").is_dir(),
        locked_bytes=None if privileged or most == resource.RLIM_INFINITY else most,
    )
