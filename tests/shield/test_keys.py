"""The key process and a server's side of it, with a real process each."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvkeep.errors import ConfigError, KeysGone, KeysUnavailable, SealError
from kvkeep.sealing import SealContext, layers_of
from kvkeep.shield import wire as w
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.keeper import Keeper, serve
from kvkeep.shield.keys import FIRST_PAUSE_S, KeyClient, _of_kind
from kvkeep.shield.keystore import KeyStore
from kvkeep.shield.opened import opened
from kvkeep.shield.providers.local import make_key_file
from kvkeep.shield.providers.provider import parse_spec
from kvkeep.shield.receipt import SignedReceipt
from kvkeep.types import PageTag
from tests.shield.vaults import Clock, Vault, found_in, page_id, vault

LAYERS = [b"one" * 50, b"two" * 30]
SIZES = [len(layer) for layer in LAYERS]
PAGE = b"".join(LAYERS)


def context(owner: str) -> SealContext:
    return SealContext(owner, PageTag(owner), b"h" * 32, b"m" * 32, b"s" * 16)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(tmp_path: Path, clock: Clock) -> Iterator[KeyClient]:
    make_key_file(tmp_path / "kek")
    store = tmp_path / "sealing.json"
    made = KeyClient(f"file:{tmp_path / 'kek'}", str(store), clock=clock.steady)
    made.start()
    yield made
    made.close()


def soon(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_pages_are_sealed_and_opened_by_keys_of_another_process(client: KeyClient) -> None:
    sealer = FrameSealer(client)
    assert sealer.name_of(context("acme")) is None, "a step never waits"
    soon(lambda: sealer.name_of(context("acme")) is not None)
    frame = sealer.seal(context("acme"), PAGE, SIZES)
    assert layers_of(sealer.open(context("acme"), frame, SIZES), SIZES) == LAYERS
    name, shelf = sealer.name_of(context("acme")), sealer.shelf_of("acme")
    assert client.rotate("acme") == 2
    assert layers_of(sealer.open(context("acme"), frame, SIZES), SIZES) == LAYERS
    assert (name, shelf) == (sealer.name_of(context("acme")), sealer.shelf_of("acme"))
    status = client.status()
    assert (status.provider, status.owners, status.granted) == ("file", 1, 3)
    assert not status.provider_down


def test_after_a_restart_every_name_is_known_at_once(client: KeyClient) -> None:
    sealer = FrameSealer(client)
    frame = sealer.seal(context("acme"), PAGE, SIZES)
    soon(lambda: sealer.name_of(context("acme")) is not None)
    again = KeyClient(client._begin.provider, client._begin.store)
    again.start()
    try:
        other = FrameSealer(again)
        assert other.name_of(context("acme")) == sealer.name_of(context("acme"))
        assert other.shelf_of("acme") == sealer.shelf_of("acme")
        assert layers_of(other.open(context("acme"), frame, SIZES), SIZES) == LAYERS
    finally:
        again.close()


def test_a_key_process_that_dies_makes_misses_and_comes_back(
    client: KeyClient, clock: Clock
) -> None:
    sealer = FrameSealer(client)
    frame = sealer.seal(context("acme"), PAGE, SIZES)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    for _ in range(3):
        with pytest.raises(KeysUnavailable):
            sealer.seal(context("acme"), PAGE, SIZES)
    assert (client.counts.deaths, client.counts.unavailable) == (1, 3)
    clock.pass_(FIRST_PAUSE_S)
    assert layers_of(sealer.open(context("acme"), frame, SIZES), SIZES) == LAYERS
    assert client.counts.starts == 2


def test_a_key_process_that_cannot_start_again_is_left_alone_longer_and_longer(
    client: KeyClient, clock: Clock, tmp_path: Path
) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    (tmp_path / "kek").unlink()
    with pytest.raises(KeysUnavailable, match="died"):
        client.status()
    for pause in (FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S):
        clock.pass_(pause - 0.01)
        with pytest.raises(KeysUnavailable, match="is down"):
            client.status()
        clock.pass_(0.02)
        with pytest.raises(KeysUnavailable, match=r"can't be started again.*can't read"):
            client.status()
    assert client.pid is None


def test_keys_that_others_made_anew_are_noticed(client: KeyClient, tmp_path: Path) -> None:
    sealer = FrameSealer(client)
    sealer.seal(context("acme"), PAGE, SIZES)
    soon(lambda: sealer.name_of(context("acme")) is not None)
    name = sealer.name_of(context("acme"))
    with opened(tmp_path / "sealing.json", parse_spec(f"file:{tmp_path / 'kek'}")) as store:
        store.shred("acme")
    assert sealer.name_of(context("acme")) == name, "a step asks nobody"
    sealer.seal(context("acme"), PAGE, SIZES)
    soon(lambda: sealer.name_of(context("acme")) not in {None, name})


def test_a_key_process_that_hangs_is_ended(client: KeyClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    client.close()
    assert client.pid is None


def test_names_that_are_late_at_start_follow(client: KeyClient) -> None:
    client.fresh("acme", page_id()).wipe()
    late = Clock()

    def slow() -> float:
        late.pass_(60.0)
        return late.steady()

    again = KeyClient(client._begin.provider, client._begin.store, clock=slow)
    again.start()
    soon(lambda: again.name_key("acme") is not None)
    again.close()


def test_a_store_that_was_spoilt_ends_no_thread(client: KeyClient, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "sealing.json")
    for owner in ("acme", "beta"):
        client.fresh(owner, page_id()).wipe()
    with store.editing() as put:
        file = store.read()
        keys = file.owners["acme"]
        put(file.with_owner("acme", msgspec.structs.replace(keys, name=keys.epochs[0].wrapped)))
    again = KeyClient(client._begin.provider, client._begin.store)
    again.start()
    assert again.name_key("acme") is None
    assert again.name_key("beta") is not None
    assert again.name_key("gamma") is None
    soon(lambda: again.name_key("gamma") is not None)
    with pytest.raises(SealError, match="changed"):
        again.fresh("acme", page_id())
    again.close()


def test_an_answer_of_another_kind_is_no_answer() -> None:
    with pytest.raises(KeysUnavailable, match="something else"):
        _of_kind(w.Rotated(1), w.Status)


def test_a_tenant_is_shredded_through_a_server_or_beside_it(
    client: KeyClient, tmp_path: Path
) -> None:
    sealer = FrameSealer(client)
    frames = {
        owner: sealer.seal(context(owner), PAGE, SIZES) for owner in ("acme", "beta", "gamma")
    }
    soon(lambda: all(sealer.name_of(context(owner)) for owner in frames))
    name = sealer.name_of(context("acme"))
    raw = client.shred("acme")
    assert msgspec.json.decode(raw, type=SignedReceipt).check().tenant == "acme"
    store = KeyStore(tmp_path / "sealing.json")
    with store.editing() as put:  # as another process, or another machine's, does
        file = store.read()
        left = {o: k for o, k in file.owners.items() if o != "beta"}
        put(msgspec.structs.replace(file, owners=left))
    for owner in ("acme", "beta"):
        with pytest.raises(KeysGone):
            next(sealer.open(context(owner), frames[owner], SIZES))
    assert layers_of(sealer.open(context("gamma"), frames["gamma"], SIZES), SIZES) == LAYERS
    assert client.counts.gone == 2
    soon(lambda: sealer.name_of(context("acme")) not in {None, name})
    with pytest.raises(ConfigError, match="no keys of a tenant nobody"):
        client.shred("nobody")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "kek").unlink(), r"can't read .*kek: No such file.*keys init"),
        (lambda folder: (folder / "kek").chmod(0o644), r"kek has mode 0644; run chmod 600"),
        (lambda folder: (folder / "kek").write_bytes(b"short"), r"kek holds no key"),
        (lambda folder: (folder / "kek").write_text("z" * 64), r"kek holds no key"),
        (lambda folder: (folder / "sealing.json").write_text("{}"), r"mode 0644|is no key store"),
    ],
)
def test_what_is_wrong_at_start_is_one_sentence(
    tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    kek, store = tmp_path / "kek", tmp_path / "sealing.json"
    make_key_file(kek)
    spoil(tmp_path)
    made = KeyClient(f"file:{kek}", str(store))
    with pytest.raises(ConfigError, match=words):
        made.start()
    made.close()
    with pytest.raises(KeysUnavailable):
        made.status()


def test_a_key_process_that_ends_before_its_first_word_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="key process can't be started"):
        KeyClient("env:NONE", str(tmp_path / "s")).start()


def talk(first: w.Request, *more: bytes) -> list[w.Reply]:
    """What a key process in this process says to a first message and raw bytes after it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        w.send(ours, first)
        for raw in more:
            ours.sendall(raw)
        ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(EOFError, OSError):
            serve(theirs)
        theirs.close()
        replies = []
        while True:
            try:
                replies.append(w.receive_reply(ours))
            except EOFError:
                return replies


def test_messages_that_are_too_long_or_none_end_the_connection(tmp_path: Path) -> None:
    make_key_file(tmp_path / "kek")
    begin = w.Begin(f"file:{tmp_path / 'kek'}", str(tmp_path / "s"), 1.0)
    for raw in (b"\xff\xff\xff\xff", b"\x02\0\0\0\xc1\xc1", b"\x09"):
        replies = talk(begin, raw)
        assert [type(reply) for reply in replies] == [w.Status]
    assert talk(w.GetStatus()) == []
    (refused,) = talk(w.Begin("vault:x", "s", 1.0))
    assert isinstance(refused, w.Refused)
    assert refused.kind == "config"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(OSError, match="too long"):
            w.send(ours, w.NameKey("x" * w.MAX_FRAME_BYTES))
        theirs.sendall(b"\x01\0\0\0\xc1")
        with pytest.raises(OSError, match="can't be read"):
            w.receive_reply(ours)


def test_every_refusal_crosses_as_what_it_was(tmp_path: Path) -> None:
    make_key_file(tmp_path / "kek")
    store = tmp_path / "s"
    with opened(store, parse_spec(f"file:{tmp_path / 'kek'}")) as held:
        keeper = Keeper(w.Begin("", "", 1.0), held)
        gone = keeper.answer(w.Known("nobody", 1, ((page_id(), 0),)))
        assert isinstance(gone, w.Refused)
        assert isinstance(w.raised(gone), KeysGone)
        store.unlink()
        lost = keeper.answer(w.NameKey("acme"))
        assert isinstance(lost, w.Refused)
        assert isinstance(w.raised(lost), ConfigError)
    assert type(w.raised(w.refusal(SealError("changed")))) is SealError
    for error in (KeysUnavailable("x"), RuntimeError("secret words")):
        refused = w.refusal(error)
        assert isinstance(w.raised(refused), KeysUnavailable)
        assert "secret" not in refused.message


SERVER = """
import sys
from kvkeep.sealing import layers_of
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.keys import KeyClient
from tests.shield.test_keys import LAYERS, PAGE, SIZES, context, soon
client = KeyClient("file:" + sys.argv[1], sys.argv[2])
client.start()
sealer = FrameSealer(client)
for owner in ("acme", "rival"):
    frame = sealer.seal(context(owner), PAGE, SIZES)
    assert layers_of(sealer.open(context(owner), frame, SIZES), SIZES) == LAYERS
    soon(lambda: sealer.name_of(context(owner)) is not None)
    print(bytes(frame[8:24]).hex(), flush=True)
print(client.pid, flush=True)
sys.stdin.read()
client.close()
"""


def test_a_servers_memory_holds_no_key_above_a_pages(tmp_path: Path) -> None:
    make_key_file(tmp_path / "kek")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "kek"), str(tmp_path / "sealing.json")],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        pages = [bytes.fromhex(server.stdout.readline()) for _ in range(2)]
        keeper = int(server.stdout.readline())
        with vault(tmp_path) as v:
            held, names = _everything(v, dict(zip(("acme", "rival"), pages)))
            try:
                shown = found_in(server.pid, held | names)
            except PermissionError:
                pytest.skip("this user may not read its own processes' memory")
            assert shown == set(names), "name keys alone: the scan finds what is there"
            assert not found_in(keeper, {"kek": held["kek"]})
        server.communicate("")


def _everything(v: Vault, pages: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Every key that a server must not hold at rest, and the name keys, which it does."""
    held = v.secrets()
    for owner, page in pages.items():
        held[f"{owner} page"] = v.ring.known(owner, 1, [(page, 0)])[1][0][:32]
    return held, {f"{owner} name": v.ring.name_key(owner)[1] for owner in pages}
