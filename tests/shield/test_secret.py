"""Memory for keys: what reads it, and what a machine without it says."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvkeep.errors import KeysUnavailable
from kvkeep.shield import secret as memory
from kvkeep.shield.secret import Hygiene, RegionKind, SecretRegion, dumpable, look

HOLDER = """
import sys
from kvkeep.shield.secret import SecretRegion
region = SecretRegion(4, secret=sys.argv[1] == "True")
slot = region.take()
region.view(slot)[:] = b"KEY-".ljust(32, b"k")
print(region.address + 32 * slot, region.kind, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def region() -> Iterator[SecretRegion]:
    made = SecretRegion(4)
    yield made
    made.close()


def test_slots_come_and_go_zeroed(region: SecretRegion) -> None:
    taken = [region.random() for _ in range(4)]
    held = [bytes(region.view(slot)) for slot in taken]
    assert len(set(held)) == 4
    assert bytes(32) not in held
    with pytest.raises(KeysUnavailable, match="used up"):
        region.take()
    region.give(taken[1])
    again = region.take()
    assert bytes(region.view(again)) == bytes(32)
    assert bytes(region.view(taken[0])) == held[0]
    assert region.free_slots == 0


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_by_proc(pid: int, address: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(16)


def read_by_call(pid: int, address: int) -> bytes:
    into = ctypes.create_string_buffer(16)
    ours = _Span(ctypes.addressof(into), 16)
    theirs = _Span(address, 16)
    libc = ctypes.CDLL(None, use_errno=True)
    count = libc.process_vm_readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    if count < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return into.raw


@pytest.mark.parametrize("secret", [True, False])
def test_another_process_reads_locked_memory_and_no_secret_memory(*, secret: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(secret)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        address, kind = process.stdout.readline().split()
        if secret and kind != "memfd_secret":
            pytest.skip("this kernel has no memfd_secret")
        for read in (read_by_proc, read_by_call):
            if secret:
                with pytest.raises(OSError, match=r"Input/output error|process_vm_readv"):
                    read(process.pid, int(address))
            else:
                try:
                    found = read(process.pid, int(address))
                except PermissionError:
                    pytest.skip("this user may not read its own processes' memory")
                assert found.startswith(b"KEY-"), "the test reads what can be read"
        process.communicate("")
    assert kind == "memfd_secret" if secret else kind in {"mlock", "unlocked"}


def _hardened(answers: mp.Queue[tuple[int, bool]]) -> None:
    from kvkeep.shield.secret import forbid_dumps

    forbid_dumps()
    answers.put((resource.getrlimit(resource.RLIMIT_CORE)[0], dumpable()))


def test_a_process_that_forbids_dumps_has_none() -> None:
    context = mp.get_context("spawn")
    answers: mp.Queue[tuple[int, bool]] = context.Queue()
    process = context.Process(target=_hardened, args=(answers,))
    process.start()
    assert answers.get(timeout=60) == (0, False)
    process.join()
    assert dumpable(), "of this process nothing changed"


def test_a_machine_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "swaps").write_text("Filename Type\n/dev/sda2 partition\n")
    (tmp_path / "config" / "tsm" / "report").mkdir(parents=True)
    found = look(tmp_path, tmp_path / "config")
    kinds: tuple[RegionKind, ...] = ("memfd_secret", "mlock", "unlocked")
    assert found.key_memory in kinds
    limit = resource.getrlimit(resource.RLIMIT_CORE)[0]
    assert found == Hygiene(found.key_memory, True, limit, True, found.locked_bytes)
    bare = look(tmp_path / "none", tmp_path / "none")
    assert (bare.swap, bare.attestation) == (False, False)


def test_no_memory_for_keys_is_told() -> None:
    with pytest.raises(KeysUnavailable, match="can be mapped"):
        SecretRegion(1 << 52)


def test_more_than_may_be_locked_is_still_memory() -> None:
    if os.geteuid() == 0:
        pytest.skip("root may lock any amount")
    region = SecretRegion(1 << 19)
    assert region.kind == "unlocked"
    region.close()


def test_children_overwrite_what_they_free_and_the_parent_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tunables = "GLIBC_TUNABLES"
    monkeypatch.setenv(tunables, "glibc.malloc.arena_max=2")
    monkeypatch.delenv("PYTHONMALLOC", raising=False)
    show = [sys.executable, "-c", "import os; print(os.environ['GLIBC_TUNABLES'])"]
    with memory.overwriting_children():
        told = subprocess.run(show, check=True, capture_output=True, text=True).stdout
        assert os.environ["PYTHONMALLOC"] == "malloc"
    assert told.strip().split(":") == [
        "glibc.malloc.arena_max=2",
        "glibc.malloc.perturb=165",
        "glibc.malloc.tcache_count=0",
    ]
    assert os.environ[tunables] == "glibc.malloc.arena_max=2"
    assert "PYTHONMALLOC" not in os.environ


def test_a_c_library_that_overwrites_nothing_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_LIBC", SimpleNamespace(mallopt=lambda *a: asked.append(a)))
    memory.overwrite_freed()
    memory.overwrite_freed(wanted=False)
    assert asked == [(-6, 165), (-6, 0)]
    monkeypatch.setattr(memory, "_LIBC", SimpleNamespace())
    memory.overwrite_freed()
    assert len(asked) == 2
