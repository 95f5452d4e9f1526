from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kvkeep.cache.tier import remote as module
from kvkeep.cache.tier.files import Directory
from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.cache.tier.remote import RemoteFrames, client_of
from kvkeep.errors import ConfigError
from tests.cache.tier import killed_tier
from tests.cache.tier.rigs import MIB, RECORD, Rig, layers_of, page
from tests.cache.tier.services import Relay, free_port, redis_server

REMOTE = TierSizes(remote_bytes=MIB)
SPACE = b"space" * 3 + b"!"
PAGES = [page(number) for number in range(1, 4)]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with redis_server(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture
def server(port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=port) as client:
        client.flushall()
        yield client


@pytest.fixture
def relay(port: int) -> Iterator[Relay]:
    made = Relay(port)
    yield made
    made.close()


def quick(port: int) -> redis.Redis:
    """Return a client that gives up soon, as `client_of` does later."""
    made: redis.Redis = client_of(f"redis://127.0.0.1:{port}/0")
    made.connection_pool.connection_kwargs |= {"socket_timeout": 0.1, "socket_connect_timeout": 0.1}
    return made


def frames(port: int, space: bytes = SPACE) -> RemoteFrames:
    return RemoteFrames(quick(port), space)


@pytest.fixture
def rig(server: redis.Redis, port: int) -> Iterator[Rig]:
    made = Rig(REMOTE, remote=lambda: frames(port))
    yield made
    made.tier.close(5.0)


def test_pages_come_back_after_a_restart(rig: Rig, server: redis.Redis) -> None:
    rig.store(*PAGES)
    rig.settle()
    assert [rig.fetch(one) for one in PAGES] == [layers_of(one) for one in PAGES]
    rig.restart()
    assert rig.held(PAGES) == [0, 1, 2]
    assert rig.use("remote").used_bytes == 3 * RECORD
    assert [rig.fetch(one) for one in PAGES] == [layers_of(one) for one in PAGES]
    assert rig.use("remote").hits == 3


def test_what_passes_its_owners_quota_leaves_the_server(rig: Rig, server: redis.Redis) -> None:
    many = [page(number) for number in range(MIB // 2 // RECORD + 5)]
    rig.store(*many)
    rig.settle()
    rig.settle()
    assert rig.held(many) == list(range(5, len(many)))
    assert len(list(server.scan_iter(b"*:f:*", count=1000))) == len(many) - 5


def test_a_forgotten_owner_leaves_nothing(rig: Rig, server: redis.Redis) -> None:
    rig.store(*PAGES, page(1, "b"))
    rig.settle()
    assert rig.tier.forget("a") == 3
    rig.settle()
    assert len(server.keys(b"*:f:*")) == len(server.keys(b"*:s:*")) == 1
    rig.restart()
    assert rig.fetch(page(1, "b")) == layers_of(page(1, "b"))
    assert not rig.held(PAGES)


def test_a_purge_needs_no_list_that_the_server_kept(rig: Rig, server: redis.Redis) -> None:
    rig.store(*PAGES)
    rig.settle()
    server.delete(*server.keys(b"*:s:*"))
    rig.tier.forget("a")
    rig.settle()
    assert server.dbsize() == 0


def test_a_purge_of_a_server_that_is_away_is_done_later(server: redis.Redis, relay: Relay) -> None:
    rig = Rig(REMOTE, remote=lambda: frames(relay.port))
    rig.store(*PAGES)
    rig.settle()
    relay.set("reset")
    rig.tier.forget("a")
    rig.settle()
    assert dict(rig.use("remote").errors) == {"purge:away": 1}
    relay.set("pass")

    later = iter(range(9, 1 << 20))

    def gone() -> bool:
        rig.store(page(next(later), "b"))
        rig.settle()
        return rig.tier.holds(page(9, "b")) or server.dbsize() == 2

    rig.until(gone)
    assert server.dbsize() == 2, "b's page and its name"
    rig.tier.close(5.0)


def test_another_key_stores_pages_are_left_alone(rig: Rig, port: int) -> None:
    rig.store(*PAGES)
    rig.settle()
    other = Rig(REMOTE, shares={"c": 0.5}, remote=lambda: frames(port, b"o" * 16))
    assert other.use("remote").pages == 0
    other.tier.close(5.0)
    rig.restart()
    assert rig.held(PAGES) == [0, 1, 2]


def test_pages_expire_in_the_server_too(rig: Rig, server: redis.Redis) -> None:
    rig.now = time.time()
    rig.store(PAGES[0], expires_s=rig.now + 60)
    rig.store(PAGES[1], expires_s=rig.now + 0.2)
    rig.settle()
    rig.until(lambda: len(server.keys(b"*:f:*")) == 1)
    assert 50_000 < server.pttl(server.keys(b"*:f:*")[0]) <= 60_000
    rig.now += 61
    assert not rig.held(PAGES)


def test_what_the_server_gave_up_is_a_miss_and_can_be_stored_again(
    rig: Rig, server: redis.Redis
) -> None:
    rig.store(PAGES[0])
    rig.settle()
    server.flushall()
    assert rig.fetch(PAGES[0]) is None
    assert dict(rig.use("remote").errors) == {"read:gone": 1}
    rig.store(PAGES[0])
    rig.settle()
    assert rig.fetch(PAGES[0]) == layers_of(PAGES[0])


@pytest.mark.parametrize("at", [0, 9, 30, 70, 80, 500, -1])
def test_a_changed_byte_is_a_miss(rig: Rig, server: redis.Redis, at: int) -> None:
    rig.store(PAGES[0])
    rig.settle()
    (key,) = server.keys(b"*:f:*")
    data = bytearray(server.get(key))
    data[at] ^= 4
    server.set(key, bytes(data))
    assert rig.fetch(PAGES[0]) is None
    assert rig.use("remote").misses == 1


def test_a_full_server_takes_nothing_and_gives_what_it_has(rig: Rig, server: redis.Redis) -> None:
    rig.store(PAGES[0])
    rig.settle()
    server.config_set("maxmemory", "1")
    try:
        rig.store(PAGES[1])
        rig.settle()
    finally:
        server.config_set("maxmemory", "0")
    assert rig.held(PAGES) == [0]
    assert dict(rig.use("remote").errors) == {"write:ENOSPC": 1}
    assert rig.fetch(PAGES[0]) == layers_of(PAGES[0])


@pytest.mark.parametrize("mode", ["reset", "hang"])
def test_a_server_that_is_away_costs_misses_and_no_wait(
    server: redis.Redis, relay: Relay, mode: str
) -> None:
    rig = Rig(REMOTE, remote=lambda: frames(relay.port))
    rig.store(PAGES[0])
    rig.settle()
    relay.set(mode)
    waited = 0.0
    for _ in range(3):
        begun = time.perf_counter()
        rig.store(PAGES[1])
        rig.tier.poll()
        rig.tier.holds(PAGES[0])
        waited = max(waited, time.perf_counter() - begun)
        assert rig.fetch(PAGES[0]) is None
    assert waited < 0.05, "the engine's thread waits for nobody"
    rig.settle()
    errors = dict(rig.use("remote").errors)
    assert errors["read:away"] == 3
    assert errors["write:away"] >= 1
    assert rig.tier.holds(PAGES[0]), "and it is not given up"
    relay.set("pass")
    rig.until(lambda: rig.fetch(PAGES[0]) == layers_of(PAGES[0]))
    rig.tier.close(5.0)


def test_a_server_that_comes_later_is_read_then(rig: Rig, relay: Relay) -> None:
    rig.store(*PAGES)
    rig.settle()
    relay.set("reset")
    late = Rig(REMOTE, remote=lambda: frames(relay.port))
    assert not late.held(PAGES)
    relay.set("pass")

    def listed() -> bool:
        late.store(page(9))
        return late.held(PAGES) == [0, 1, 2]

    late.until(listed)
    assert late.fetch(PAGES[1]) == layers_of(PAGES[1])
    late.tier.close(5.0)


def test_pauses_between_tries_double(port: int) -> None:
    now = [0.0]
    away = RemoteFrames(quick(free_port()), SPACE, lambda: now[0])
    assert away.open(0.0) == []
    assert not away.unread()
    now[0] += module.FIRST_PAUSE_S
    assert away.unread()
    assert away.open(0.0) == []
    now[0] += module.FIRST_PAUSE_S
    assert not away.unread()


def test_a_server_that_refuses_us_is_told_at_start(server: redis.Redis, port: int) -> None:
    server.config_set("requirepass", "secret")
    try:
        with pytest.raises(ConfigError, match="REDIS_PASSWORD"):
            frames(port)
    finally:
        server.config_set("requirepass", "")


@pytest.mark.parametrize("url", ["redis://:pw@host:1/0", "redis://host:port/0"])
def test_addresses_that_cannot_be_used_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="tier"):
        client_of(url)


@pytest.mark.parametrize("number", [5, 70, 130])
def test_a_process_killed_between_disk_and_server_leaves_whole_pages(
    server: redis.Redis, port: int, tmp_path: Path, number: int
) -> None:
    command = [sys.executable, "-m", "tests.cache.tier.killed_tier", str(tmp_path), str(port)]
    done = subprocess.run([*command, str(number)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wrote = [page(int(one)) for one in done.stdout.split()]
    again = killed_tier.rig(Directory(tmp_path), port)
    assert again.held(wrote) == list(range(len(wrote)))
    assert [again.fetch(one) for one in wrote] == [layers_of(one) for one in wrote]
    again.settle()
    assert not any(use.misses for use in again.tier.uses())
    assert set(dict(again.use("remote").errors)) <= {"record"}, "one may have been cut off"
    again.store(page(1000))
    again.settle()
    assert again.fetch(page(1000)) == layers_of(page(1000))
    again.tier.close(5.0)
