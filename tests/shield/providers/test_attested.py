"""Keys that a verifier releases to an attested machine, against a stand-in of both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError, KeysUnavailable, SealError
from kvkeep.shield.attestation import ReportEntry
from kvkeep.shield.keys import KeyClient, unwrap_model
from kvkeep.shield.providers.attested import RELEASED_S, AttestedProvider
from kvkeep.shield.providers.make import make_provider
from kvkeep.shield.providers.provider import parse_spec
from kvkeep.shield.secret import SecretRegion
from tests.shield.providers.machines import Machine, Verifier, machine, signed, verifier
from tests.shield.vaults import Clock

KEY = memoryview(b"k" * 32)
LABEL = b"label"


@pytest.fixture
def service() -> Iterator[Verifier]:
    with verifier() as one:
        yield one


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "entry") as one:
        yield one


@pytest.fixture
def region() -> Iterator[SecretRegion]:
    one = SecretRegion(8)
    yield one
    one.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def provider(
    service: Verifier, guest: Machine, region: SecretRegion, clock: Clock
) -> AttestedProvider:
    entry = ReportEntry(guest.path)
    return AttestedProvider(service.url, "kek", entry, region, clock.steady)


def unwrapped(provider: AttestedProvider, wrapped: bytes, label: bytes = LABEL) -> bytes:
    into = bytearray(32)
    provider.unwrap(wrapped, label, memoryview(into))
    return bytes(into)


def test_an_attested_machine_wraps_and_unwraps(provider: AttestedProvider) -> None:
    wrapped = provider.wrap(KEY, LABEL)
    assert unwrapped(provider, wrapped) == bytes(KEY)
    assert provider.rewrap(wrapped, LABEL) == wrapped
    assert provider.destroy(LABEL) is False
    with pytest.raises(SealError, match="wrapped by another key"):
        unwrapped(provider, wrapped, b"other")


def test_a_machine_attests_anew_each_minute_and_can_be_refused_then(
    provider: AttestedProvider, service: Verifier, clock: Clock
) -> None:
    wrapped = provider.wrap(KEY, LABEL)
    clock.pass_(RELEASED_S - 1)
    assert unwrapped(provider, wrapped) == bytes(KEY)
    assert service.releases == 1
    clock.pass_(1)
    assert unwrapped(provider, wrapped) == bytes(KEY)
    assert service.releases == 2
    service.measurement = b"newer"
    clock.pass_(RELEASED_S)
    for _ in range(2):
        with pytest.raises(KeysUnavailable, match="refuses this machine's report"):
            unwrapped(provider, wrapped)
    assert bytes(provider._view) == bytes(32), "what was released is forgotten"
    service.measurement = b"good"
    assert unwrapped(provider, wrapped) == bytes(KEY)


def test_a_report_of_another_time_or_key_releases_nothing(
    provider: AttestedProvider, guest: Machine
) -> None:
    provider.wrap(KEY, LABEL)
    guest.replayed = signed(os.urandom(64), b"good")
    provider._until = float("-inf")
    with pytest.raises(KeysUnavailable, match="refuses this machine's report"):
        provider.wrap(KEY, LABEL)


@pytest.mark.parametrize(
    ("path", "answer", "sentence"),
    [
        ("/v1/challenge", (500, b""), "answers 500 to a challenge"),
        ("/v1/challenge", (200, b"{}"), "answer to a challenge can't be read"),
        ("/v1/challenge", (200, b'{"nonce":"AAAA"}'), "challenge is too short"),
        ("/v1/release", (403, b""), "refuses this machine's report"),
        ("/v1/release", (200, b'{"public":"AA==","wrapped":"AA=="}'), "does not open"),
        (
            "/v1/release",
            (200, b'{"public":"%s","wrapped":"%s"}' % (b"CQ" + b"A" * 41 + b"=", b"A" * 64)),
            "does not open",
        ),
    ],
)
def test_what_a_verifier_may_say_instead(
    provider: AttestedProvider,
    service: Verifier,
    path: str,
    answer: tuple[int, bytes],
    sentence: str,
) -> None:
    service.says[path] = answer
    with pytest.raises(KeysUnavailable, match=sentence):
        provider.wrap(KEY, LABEL)
    service.says.clear()
    assert unwrapped(provider, provider.wrap(KEY, LABEL)) == bytes(KEY)


def test_a_verifier_that_is_away_is_told(guest: Machine, region: SecretRegion) -> None:
    spec = parse_spec(f"attested:http://127.0.0.1:9,kek,{guest.path}")
    with pytest.raises(KeysUnavailable, match="does not answer: ConnectError"):
        make_provider(spec, region).wrap(KEY, LABEL)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("attested:http://example.org,kek", "keys would cross a network in the clear"),
        ("attested:ftp://example.org,kek", r"attested is written attested:URL,KEY with"),
        ("attested:https://example.org", r"attested is written attested:URL,KEY\[,ENTRY\]"),
        ("attested:https://example.org,kek,e,f", r"attested is written"),
        ("attested:https://example.org,,e", r"attested is written"),
    ],
)
def test_what_names_no_verifier_is_refused(region: SecretRegion, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_provider(parse_spec(text), region)


def test_a_key_process_attests_for_itself(
    service: Verifier, guest: Machine, tmp_path: Path
) -> None:
    spec = f"attested:{service.url},kek,{guest.path}"
    client = KeyClient(spec, str(tmp_path / "sealing.json"))
    assert client.start().provider == "attested"
    try:
        made = client.fresh("acme", b"p" * 16)
        (known,) = client.known("acme", made.epoch, [(b"p" * 16, 0)])
        assert bytes(known.material) == bytes(made.material)
    finally:
        client.close()
    assert service.releases == 1
    service.measurement = b"newer"
    with pytest.raises(ConfigError, match="attested can't be used now: the verifier refuses"):
        KeyClient(spec, str(tmp_path / "sealing.json")).start()
    with pytest.raises(KeysUnavailable, match="the verifier refuses"):
        unwrap_model(spec, "id", b"")
