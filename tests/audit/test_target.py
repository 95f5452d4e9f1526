from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from kvkeep.audit import Account, cast_of
from kvkeep.audit.target import base_url, check_consent, new_client
from kvkeep.errors import AuditError, ConfigError
from tests.audit.fakes import FakeServer


def test_the_first_key_is_the_victims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").write_text("two\n")
    monkeypatch.setenv("THIRD_KEY", "three")
    cast = cast_of(["a=one", f"b=@{tmp_path / 'b'}", "c=env:THIRD_KEY"])
    assert cast.victim == Account("a", "one")
    assert cast.attacker == Account("b", "two")
    assert cast.sybils == (Account("c", "three"),)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "two tenants"),
        (["a=one"], "two tenants"),
        (["a=one", "secret-key"], "number 2 must read NAME=KEY"),
        (["a=one", "b="], "number 2"),
        (["a=one", "a=two"], "same name"),
        (["a=one", "b=one"], "same name or the same key"),
        (["a=one", "b=@/nowhere"], "can't read the file given for b"),
        (["a=one", "b=env:NO_SUCH_VARIABLE"], "is not set"),
    ],
)
def test_wrong_keys_are_refused_and_never_repeated(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        cast_of(words)
    assert str(refused.value).startswith("key: ")
    assert "secret-key" not in str(refused.value)
    assert "one" not in str(refused.value).split()


def test_a_key_is_not_printed() -> None:
    assert "hidden" not in repr(cast_of(["a=hidden", "b=hidden2"]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/"),
        ("https://host/openai/v1", "https://host/openai"),
    ],
)
def test_a_url_is_taken_with_or_without_v1(text: str, wanted: str) -> None:
    assert str(base_url(text)) == wanted


@pytest.mark.parametrize("text", ["", "127.0.0.1:8000", "ftp://a", "http://me:pw@host", "http://"])
def test_other_urls_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^url: ") as refused:
        base_url(text)
    assert "pw" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_this_machine_needs_no_consent(host: str) -> None:
    async with new_client(httpx.URL(f"http://{host}:1"), FakeServer().transport()) as client:
        await check_consent(client, None)


@pytest.mark.parametrize(
    ("served", "given", "says"),
    [
        ("token", None, "is not this machine"),
        ("token", "", "is not this machine"),
        (None, "token", "does not serve this token"),
        ("token", "tok", "does not serve this token"),
    ],
)
async def test_another_machine_must_consent(
    served: str | None, given: str | None, says: str
) -> None:
    server = FakeServer(consent=served)
    async with new_client(httpx.URL("http://example.org"), server.transport()) as client:
        with pytest.raises(ConfigError, match=says) as refused:
            await check_consent(client, given)
    assert str(refused.value).startswith("consent: ")
    assert not server.bodies


async def test_a_served_token_is_consent() -> None:
    transport = FakeServer(consent="token").transport()
    async with new_client(httpx.URL("http://example.org"), transport) as client:
        await check_consent(client, "token")


async def test_a_target_that_is_not_there_is_an_error() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    transport = httpx.MockTransport(gone)
    async with new_client(httpx.URL("http://example.org"), transport) as client:
        with pytest.raises(AuditError, match="no server answers"):
            await check_consent(client, "token")
