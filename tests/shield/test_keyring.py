from __future__ import annotations

import base64
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvkeep.errors import ConfigError, KeysGone, KeysUnavailable, SealError
from kvkeep.shield import envelope
from kvkeep.shield.issue import EPOCH_PAGES, EPOCH_S, RESERVED_PAGES, Issuer
from kvkeep.shield.keyring import MAX_OWNERS, PROVIDER_PAUSE_S, REFRESH_S, UNWRAPPED_S
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.providers.local import LocalProvider, make_key_file
from kvkeep.shield.receipt import open_store, shred
from tests.shield import reference
from tests.shield.vaults import Vault, issuer, page_id, vault


@pytest.fixture
def v(tmp_path: Path) -> Iterator[Vault]:
    with vault(tmp_path) as made:
        yield made


def test_a_page_key_is_the_books_and_comes_again(v: Vault) -> None:
    page = page_id()
    _, epoch, (made,) = v.ring.fresh("acme", [page])
    assert v.ring.known("acme", epoch, [(page, 0)])[1] == [made]
    assert v.new_ring().known("acme", epoch, [(page, 0)])[1] == [made]
    key = v.secrets()[f"acme epoch {epoch}"]
    assert made == reference.hkdf_expand(key, b"kvs1|page" + page + bytes(4), 64)
    assert v.ring.known("acme", epoch, [(page, 1)])[1] != [made]


def test_owners_have_nothing_in_common(v: Vault) -> None:
    page = page_id()
    one, other = v.ring.fresh("acme", [page]), v.ring.fresh("rival", [page])
    assert one[2] != other[2]
    assert v.ring.name_key("acme") != v.ring.name_key("rival")
    keys = v.secrets()
    assert len(set(keys.values())) == len(keys) == 5
    with pytest.raises(KeysGone):
        v.ring.known("nobody", 1, [(page, 0)])
    with pytest.raises(KeysGone):
        v.ring.known("acme", 7, [(page, 0)])


def test_wrapped_keys_are_bound_to_owner_and_epoch(v: Vault) -> None:
    v.ring.fresh("acme", [page_id()])
    keys = v.store.read().owners["acme"]
    root, into = v.secrets()["acme root"], memoryview(bytearray(32))
    for owner, epoch in (("rival", 1), ("acme", 2)):
        label = envelope.epoch_label(owner, keys.key_id, epoch)
        with pytest.raises(SealError, match="changed"):
            envelope.unwrap(root, keys.epochs[0].wrapped, label, into)
        assert bytes(into) == bytes(32)
    with pytest.raises(SealError, match="form"):
        envelope.unwrap(root, b"\x02" + keys.name[1:], b"", into)


def test_an_epoch_ends_by_either_clock_and_its_pages_stay(v: Vault) -> None:
    page = page_id()
    _, first, (made,) = v.ring.fresh("acme", [page])
    name = v.ring.name_key("acme")
    v.clock.pass_(EPOCH_S - 1)
    assert v.ring.fresh("acme", [page_id()])[1] == first
    v.clock.pass_(2)
    _, second, _ = v.ring.fresh("acme", [page_id()])
    assert second == first + 1
    v.clock.steady_s += EPOCH_S  # the wall clock stands still
    assert v.ring.fresh("acme", [page_id()])[1] == second + 1
    assert v.ring.known("acme", first, [(page, 0)])[1] == [made]
    assert v.ring.name_key("acme") == name, "no name changes with an epoch"


def test_a_clock_that_jumps_never_brings_an_epoch_back(v: Vault) -> None:
    seen, pages = [], {}
    for jump in (0.0, -7 * EPOCH_S, 30 * EPOCH_S, -400 * EPOCH_S, 0.0, -61.0):
        v.clock.wall_s += jump
        page = page_id()
        _, epoch, (made,) = v.new_ring().fresh("acme", [page])
        seen.append(epoch)
        pages[epoch, page] = made
    assert seen == [1, 2, 3, 4, 4, 5]
    keys = {epoch: v.secrets()[f"acme epoch {epoch}"] for epoch in set(seen)}
    assert len(set(keys.values())) == 5
    for (epoch, page), made in pages.items():
        assert v.ring.known("acme", epoch, [(page, 0)])[1] == [made]


def test_pages_are_counted_over_restarts_and_processes(
    v: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    v.ring.fresh("acme", [page_id()] * 3)
    v.new_ring().fresh("acme", [page_id()])
    (epoch,) = v.store.read().owners["acme"].epochs
    assert epoch.pages == 2 * RESERVED_PAGES
    monkeypatch.setattr("kvkeep.shield.issue.EPOCH_PAGES", 2 * RESERVED_PAGES)
    assert v.ring.fresh("acme", [page_id()])[1] == 1, "reserved before"
    assert v.new_ring().fresh("acme", [page_id()])[1] == 2, "full: the next epoch"
    assert EPOCH_PAGES == 1 << 28


def test_an_owner_that_two_processes_meet_first_has_one_set_of_keys(v: Vault) -> None:
    one, other = v.ring, v.new_ring()
    assert one.name_key("acme") == other.name_key("acme")
    made = issuer(v).make_owner("acme")
    assert made == v.store.read().owners["acme"]
    assert one.rotate("acme") == other.rotate("acme") - 1
    old = v.store.read().owners["acme"]
    root = memoryview(bytearray(v.secrets()["acme root"]))
    assert issuer(v).next_epoch("acme", old.root, root, 1).number == 3, "others were first"


def test_a_new_root_leaves_pages_and_names_as_they_are(v: Vault) -> None:
    page = page_id()
    _, epoch, (made,) = v.ring.fresh("acme", [page])
    before, name = v.secrets(), v.ring.name_key("acme")
    old = v.store.read().owners["acme"].root
    issuer(v).renew_root("acme")
    after = v.secrets()
    assert before["acme root"] != after["acme root"]
    assert before["acme epoch 1"] == after["acme epoch 1"]
    assert v.ring.known("acme", epoch, [(page, 0)])[1] == [made]
    assert v.ring.rotate("acme") == 2
    assert v.ring.name_key("acme") == name
    with pytest.raises(KeysUnavailable, match="meanwhile"):
        issuer(v).next_epoch("acme", old, memoryview(bytearray(32)), 2)
    with pytest.raises(KeysGone, match="meanwhile"):
        issuer(v).reserve("acme", "another id", 1)


def test_another_provider_takes_over_and_the_old_key_opens_nothing(
    v: Vault, tmp_path: Path
) -> None:
    page = page_id()
    open_store(v.store, v.provider, "file", v.region)
    _, epoch, (made,) = v.ring.fresh("acme", [page])
    make_key_file(tmp_path / "other")
    other = LocalProvider.of_file(tmp_path / "other", v.region)
    assert issuer(v).rewrap_all(other, "file") == 1
    with pytest.raises(SealError):
        v.new_ring().known("acme", epoch, [(page, 0)])
    with pytest.raises(ConfigError, match="does not open"):
        open_store(v.store, v.provider, "file", v.region)
    v.provider._inner = other
    open_store(v.store, v.provider, "file", v.region)
    assert v.new_ring().known("acme", epoch, [(page, 0)])[1] == [made]
    assert Issuer(v.store, other, v.region).rewrap_all(other, "file") == 1


def test_a_short_outage_goes_unnoticed_and_a_long_one_makes_misses(v: Vault) -> None:
    page = page_id()
    _, epoch, _ = v.ring.fresh("acme", [page])
    v.provider.down = True
    v.clock.pass_(REFRESH_S + 1)
    v.ring.known("acme", epoch, [(page, 0)])
    asked = v.provider.unwraps
    assert v.ring.provider_down
    v.ring.known("acme", epoch, [(page, 0)])
    assert v.provider.unwraps == asked, "a provider that is down is left alone for a moment"
    v.clock.pass_(UNWRAPPED_S - REFRESH_S)
    for _ in range(2):
        with pytest.raises(KeysUnavailable):
            v.ring.known("acme", epoch, [(page, 0)])
    with pytest.raises(KeysUnavailable):
        v.ring.name_key("late")
    assert v.region.free_slots == 255, "nothing is held but the provider's key"
    v.provider.down = False
    v.clock.pass_(PROVIDER_PAUSE_S)
    v.ring.known("acme", epoch, [(page, 0)])
    assert v.ring.counts.provider_failures == 2


def test_keys_are_asked_for_again_within_a_minute(v: Vault) -> None:
    v.ring.fresh("acme", [page_id()])
    asked = v.provider.unwraps
    v.clock.pass_(REFRESH_S - 1)
    v.ring.fresh("acme", [page_id()])
    assert v.provider.unwraps == asked
    v.clock.pass_(1)
    v.ring.fresh("acme", [page_id()])
    assert v.provider.unwraps == asked + 1
    assert UNWRAPPED_S < 60


def test_shredded_keys_open_nothing_at_once_in_any_process(v: Vault) -> None:
    page = page_id()
    rings = [v.ring, v.new_ring()]
    _, epoch, (made,) = v.ring.fresh("acme", [page])
    _, _, (kept,) = v.ring.fresh("rival", [page])
    name = v.ring.name_key("acme")
    rings[1].known("acme", epoch, [(page, 0)])
    shred("acme", KeyStore(v.store.path), v.provider, v.region)
    for ring in rings:
        with pytest.raises(KeysGone):
            ring.known("acme", epoch, [(page, 0)])
        assert ring.known("rival", 1, [(page, 0)])[1] == [kept]
    again = v.ring.fresh("acme", [page])
    assert (again[1], again[2] == [made]) == (epoch + 1, False), "no number comes twice"
    assert v.ring.name_key("acme") != name


def test_memory_for_keys_is_shared_by_the_latest_owners(v: Vault) -> None:
    for number in range(150):
        v.ring.name_key(f"tenant{number}")
    assert v.region.free_slots >= 0
    for number in (0, 149):
        assert v.ring.fresh(f"tenant{number}", [page_id()])[1] == 1
    v.ring.forget()
    assert v.region.free_slots == 255
    assert MAX_OWNERS * 2 < 8192


def test_a_spoilt_epoch_key_opens_nothing_and_takes_no_memory(v: Vault) -> None:
    v.ring.fresh("acme", [page_id()])
    v.ring.forget()
    with v.store.editing() as put:
        file = v.store.read()
        keys = file.owners["acme"]
        spoilt = msgspec.structs.replace(keys.epochs[0], wrapped=keys.name)
        put(file.with_owner("acme", msgspec.structs.replace(keys, epochs=(spoilt,))))
    for _ in range(2):
        with pytest.raises(SealError, match="changed"):
            v.ring.known("acme", 1, [(page_id(), 0)])
    assert v.region.free_slots == 253, "root and name key alone are held"


def test_keys_in_use_are_not_dropped_for_their_own_sake(v: Vault) -> None:
    page = page_id()
    _, first, (made,) = v.ring.fresh("acme", [page])
    v.ring.forget()
    assert v.ring.rotate("acme") == first + 1
    v.ring.name_key("beta")
    taken = [v.region.take() for _ in range(v.region.free_slots - 3)]
    assert v.ring.known("acme", first, [(page, 0)])[1] == [made]
    assert v.region.free_slots == 4, "beta's two made room for one"
    for slot in taken:
        v.region.give(slot)


def test_a_store_without_keys_of_its_own_is_wrapped_anew_too(v: Vault) -> None:
    v.ring.fresh("acme", [page_id()])
    assert issuer(v).rewrap_all(v.provider, "file") == 1
    assert v.store.read().own is None


def test_rotating_who_has_no_keys_is_refused(v: Vault) -> None:
    with pytest.raises(KeysGone):
        v.ring.rotate("nobody")
    assert v.ring.owners() == ()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from kvkeep.shield import keystore
from tests.shield.vaults import issuer, page_id, vault

left = int(sys.argv[2])

def counted(call):
    def wrapper(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        done = call(*arguments, **named)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return wrapper

with vault(Path(sys.argv[1])) as v:
    for name in ("open", "fsync", "close", "fstat", "pwrite"):
        setattr(keystore.os, name, counted(getattr(os, name)))
    keystore.Path.replace = counted(Path.replace)
    keystore.Path.unlink = counted(Path.unlink)
    match sys.argv[3]:
        case "rotate": v.ring.rotate("acme")
        case "root": issuer(v).renew_root("acme")
        case "owner": v.ring.fresh("late", [page_id()])
        case "rewrap": issuer(v).rewrap_all(v.provider, "file")
print("done")
"""


def killed_at(folder: Path, point: int, what: str) -> bool:
    """Do something in a process that is killed at its n-th system call; True: it was."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(point), what, root],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL or done.stdout == "done\n", done.stderr
    return done.returncode != 0


@pytest.mark.parametrize(
    ("what", "points"),
    [
        ("rotate", (1, 3, 6, 8, 10)),
        *(
            pytest.param(what, tuple(range(1, 60)), marks=pytest.mark.slow)
            for what in ("rotate", "root", "owner", "rewrap")
        ),
    ],
)
def test_a_kill_while_keys_change_loses_none(
    tmp_path: Path, what: str, points: tuple[int, ...]
) -> None:
    page, kills = page_id(), 0
    with vault(tmp_path) as v:
        _, _, (made,) = v.ring.fresh("acme", [page])
    for point in points:
        kills += killed_at(tmp_path, point, what)
        with vault(tmp_path) as v:
            assert v.ring.known("acme", 1, [(page, 0)])[1] == [made]
            numbers = [e.number for e in v.store.read().owners["acme"].epochs]
            assert numbers == list(range(1, len(numbers) + 1))
            assert v.ring.fresh("acme", [page_id()])[1] == len(numbers)
            v.secrets()
    assert kills >= 5


def test_a_store_that_cannot_be_written_says_so(v: Vault) -> None:
    v.ring.fresh("acme", [page_id()])
    sibling = v.store.path.with_name(v.store.path.name + ".new")
    sibling.mkdir()
    with pytest.raises(ConfigError, match=r"shield_store: can't write .*sealing.json"):
        v.ring.rotate("acme")
    assert v.ring.fresh("acme", [page_id()])[1] == 1
    sibling.rmdir()
    assert v.ring.rotate("acme") == 2


def test_retired_epochs_open_nothing_and_the_newest_is_never_retired(v: Vault) -> None:
    pages = []
    for _ in range(3):
        page = page_id()
        pages.append((page, v.ring.fresh("acme", [page])[1]))
        v.ring.rotate("acme")
    assert [epoch for _, epoch in pages] == [1, 2, 3]
    assert v.ring.newest("acme") == 4
    text = v.store.path.read_text()
    first = base64.b64encode(v.store.read().owners["acme"].epochs[0].wrapped).decode()
    assert first in text
    assert issuer(v).retire("acme", 3) == 2
    assert issuer(v).retire("acme", 3) == 0
    assert first not in v.store.path.read_text()
    for page, epoch in pages[:2]:
        with pytest.raises(KeysGone, match="destroyed"):
            v.ring.known("acme", epoch, [(page, 0)])
    assert v.ring.known("acme", 3, [(pages[2][0], 0)])
    assert issuer(v).retire("acme", 99) == 1
    assert [e.number for e in v.store.read().owners["acme"].epochs] == [4]
    assert v.ring.rotate("acme") == 5
    with pytest.raises(KeysGone, match="has no keys"):
        issuer(v).retire("nobody", 2)
