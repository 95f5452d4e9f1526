"""Who a request is, and which scope its cached pages live in."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from kvkeep.errors import Forbidden, InvalidRequest, Unauthenticated
from kvkeep.server.identity import Authenticator, LoopbackAuthenticator, derive_scope
from kvkeep.server.store import TenantStore
from kvkeep.server.tenants import TenantFile
from kvkeep.types import PUBLIC_SCOPE

KEY = b"k" * 32
part = st.text(max_size=8)
scope_input = st.tuples(part, st.none() | part, st.lists(part, max_size=3).map(tuple))


@given(scope_input, scope_input)
def test_scopes_are_equal_exactly_when_their_inputs_are(
    a: tuple[str, str | None, tuple[str, ...]], b: tuple[str, str | None, tuple[str, ...]]
) -> None:
    assert (derive_scope(KEY, *a) == derive_scope(KEY, *b)) == (a == b)


def test_scopes_are_opaque_keyed_and_never_public() -> None:
    scope = derive_scope(KEY, "acme", "alice", ("salt",))
    assert scope != derive_scope(b"other" * 8, "acme", "alice", ("salt",))
    assert scope != PUBLIC_SCOPE
    assert not any(word in scope for word in ("acme", "alice", "salt"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", None, ()), ("a", "b", ())),
        (("a", "", ()), ("a", None, ())),
        (("a", None, ("b",)), ("a", "b", ())),
        (("a", "b", ("c",)), ("a", "bc", ())),
        (("gw/a", None, ()), ("gw", "a", ())),
    ],
)
def test_pieces_can_not_be_shifted_between_fields(one: tuple, other: tuple) -> None:  # type: ignore[type-arg]
    assert derive_scope(KEY, *one) != derive_scope(KEY, *other)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class House:
    """A tenant file with a plain tenant and a gateway, and who they are to an authenticator."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.file = TenantFile(path, now=self.clock)
        self.plain = self.file.add("acme", share=0.5, concurrency=10).text
        self.gateway = self.file.add(
            "gw", share=0.4, concurrency=10, gateway=True, children={"a": 0.5, "tiny": 0.01}
        ).text
        self.store = TenantStore.open(path)
        self.auth = Authenticator(self.store, now=self.clock)

    def identify(self, key: str, **headers: str):  # type: ignore[no-untyped-def]
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.auth.identify(Headers({"authorization": f"Bearer {key}"} | named), "c")


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "tenants.json")


def test_a_key_is_its_tenant(house: House) -> None:
    who = house.identify(house.plain)
    assert (who.account, who.concurrency, who.subject, who.salt) == ("acme", 10, None, None)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic {key}", "{key}", "Bearer {key}x", "Bearer kvk_x", "Bearer é"],
)
def test_anything_but_a_valid_key_is_401(house: House, header: str) -> None:
    headers = Headers(raw=[(b"authorization", header.format(key=house.plain).encode())])
    with pytest.raises(Unauthenticated):
        house.auth.identify(headers, "c")
    with pytest.raises(Unauthenticated):
        house.auth.identify(Headers({}), "c")


def test_another_servers_key_is_401(house: House, tmp_path: Path) -> None:
    other = TenantFile(tmp_path / "other.json").add("acme", share=0.5)
    with pytest.raises(Unauthenticated):
        house.identify(other.text)


def test_a_key_ends_at_its_expiry(house: House) -> None:
    key = house.file.rotate("acme", expires_s=60).text
    house.store.reload()
    assert house.identify(key).account == "acme"
    house.clock.now += 60
    with pytest.raises(Unauthenticated):
        house.identify(key)


def test_only_a_gateway_may_assert_an_identity(house: House) -> None:
    for name in ("x_kvkeep_tenant", "x_kvkeep_subject"):
        for value in ("a", ""):
            with pytest.raises(Forbidden):
                house.identify(house.plain, **{name: value})


def test_a_gateways_child_has_its_own_account_and_its_slice_of_the_cap(house: House) -> None:
    who = house.identify(house.gateway, x_kvkeep_tenant="a", x_kvkeep_subject="alice")
    assert (who.account, who.subject, who.concurrency) == ("gw/a", "alice", 5)
    assert house.identify(house.gateway, x_kvkeep_tenant="tiny").concurrency == 1
    assert house.identify(house.gateway).account == "gw"
    assert house.identify(house.gateway, x_kvkeep_subject="alice").account == "gw"


@pytest.mark.parametrize("child", ["unknown", "acme", "gw"])
def test_a_gateway_stays_inside_its_own_namespace(house: House, child: str) -> None:
    with pytest.raises(Forbidden):
        house.identify(house.gateway, x_kvkeep_tenant=child)


@pytest.mark.parametrize("child", ["", "a/b", "../acme", "a b", "a" * 64, "ä"])
def test_a_malformed_child_is_400(house: House, child: str) -> None:
    with pytest.raises(InvalidRequest):
        house.identify(house.gateway, x_kvkeep_tenant=child)


@pytest.mark.parametrize("subject", ["", " ", "a b", "x" * 129, "ä", "a\x7f", "-a"])
def test_a_malformed_subject_is_400(house: House, subject: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 128"):
        house.identify(house.gateway, x_kvkeep_subject=subject)


@pytest.mark.parametrize("salt", ["", " ", "a b", "x" * 257, "ä", "a\t"])
def test_a_malformed_salt_is_400(house: House, salt: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 256"):
        house.identify(house.plain, x_cache_salt=salt)


@pytest.mark.parametrize(
    "name",
    [
        "authorization",
        "x-kvkeep-tenant",
        "x-kvkeep-subject",
        "x-cache-salt",
        "x-kvkeep-store",
        "x-kvkeep-evict",
    ],
)
def test_a_header_sent_twice_is_400(house: House, name: str) -> None:
    raw = [(b"authorization", f"Bearer {house.gateway}".encode()), (name.encode(), b"a")]
    if name != "authorization":
        raw.append((name.encode(), b"a"))
    with pytest.raises(InvalidRequest, match="once"):
        house.auth.identify(Headers(raw=raw), "c")


def test_a_gateway_without_a_rest_must_name_a_child(house: House) -> None:
    key = house.file.add("full", share=0.1, gateway=True, children={"x": 0.5, "y": 0.5}).text
    house.store.reload()
    with pytest.raises(Forbidden):
        house.identify(key)
    assert house.identify(key, x_kvkeep_tenant="x").account == "full/x"
    assert "full" not in house.store.quotas()


def test_what_must_not_be_stored_says_so_in_one_word(house: House) -> None:
    assert house.identify(house.plain).store
    assert not house.identify(house.plain, x_kvkeep_store="never").store
    for word in ("", "Never", "no", "memory"):
        with pytest.raises(InvalidRequest, match="must be 'never'"):
            house.identify(house.plain, x_kvkeep_store=word)


def test_who_must_lose_nothing_says_so_in_one_word(house: House) -> None:
    assert house.identify(house.plain).evict
    kept = house.identify(house.plain, x_kvkeep_evict="never")
    assert (kept.evict, kept.store) == (False, True)
    with pytest.raises(InvalidRequest, match="must be 'never'"):
        house.identify(house.plain, x_kvkeep_evict="off")


LOCAL = LoopbackAuthenticator(4)


def test_without_authentication_every_connection_has_its_own_scope() -> None:
    one = LOCAL.identify(Headers({"host": "localhost:8000"}), "1")
    two = LOCAL.identify(Headers({"host": "[::1]:8000"}), "2")
    assert one.account == two.account == "local"
    assert one.subject != two.subject


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "1.2.3.4"},
        {"forwarded": "for=1.2.3.4"},
        {"x-real-ip": ""},
        {"via": "1.1 proxy"},
        {"x-kvkeep-subject": "alice"},
        {"x-kvkeep-tenant": "a"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
    ],
)
def test_without_authentication_forwarded_and_foreign_requests_are_403(
    headers: dict[str, str],
) -> None:
    with pytest.raises(Forbidden):
        LOCAL.identify(Headers({"host": "127.0.0.1"} | headers), "1")
