from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from kvkeep.cli import run
from kvkeep.server.tenants import TenantFile


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["--keys", str(tmp_path / "keys.json")]


def test_a_key_is_shown_once_on_stdout(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tenant", "add", "acme", "--share", "0.5", *keys]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("kvk_")
    assert key not in Path(keys[1]).read_text()
    assert run(["tenant", "list", *keys]) == 0
    listed = capsys.readouterr().out
    assert "acme" in listed
    assert key.split("_")[1] in listed
    assert key not in listed


def test_rotate_leaves_two_live_keys_and_revoke_none(
    keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tenant", "add", "acme", "--share", "0.5", *keys]) == 0
    first = capsys.readouterr().out.split("_")[1]
    assert run(["tenant", "rotate", "acme", *keys]) == 0
    second = capsys.readouterr().out.split("_")[1]
    assert run(["tenant", "list", *keys]) == 0
    assert f"{first}, {second}" in capsys.readouterr().out
    assert run(["tenant", "revoke", "acme", "--key", first, *keys]) == 0
    assert run(["tenant", "list", *keys]) == 0
    assert first not in capsys.readouterr().out
    assert run(["tenant", "revoke", "acme", *keys]) == 0
    assert run(["tenant", "list", *keys]) == 0
    assert "acme" not in capsys.readouterr().out


def test_gateway_children(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    gateway = ["tenant", "add", "gate", "--share", "1", "--gateway"]
    assert run([*gateway, "--child", "a=0.5", "--child", "b=0.5", *keys]) == 0
    assert run(["tenant", "add", "late", "--share", "0.1", *keys]) == 1
    assert "share: " in capsys.readouterr().err


@pytest.mark.parametrize("child", ["a", "a=", "a=much"])
def test_a_malformed_child_is_one_sentence(
    keys: list[str], child: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tenant", "add", "g", "--share", "1", "--gateway", "--child", child, *keys]) == 1
    assert capsys.readouterr().err.startswith("kvkeep: child: ")


def test_sharing_is_told_at_the_start(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = [
        "--group",
        "team",
        "--no-contribute",
        "--consume",
        "--store",
        "memory",
        "--ttl-s",
        "60",
        "--no-coded",
        "--no-evict",
    ]
    assert run(["tenant", "add", "acme", "--share", "0.5", *told, *keys]) == 0
    tenant = TenantFile(Path(keys[1])).list()[0]
    assert (tenant.group, tenant.contribute, tenant.consume) == ("team", False, True)
    assert (tenant.store, tenant.ttl_s, tenant.coded) == ("memory", 60.0, False)
    assert not tenant.terms().evict
    capsys.readouterr()
    assert run(["tenant", "list", *keys]) == 0
    assert "team" in capsys.readouterr().out
    assert run(["tenant", "add", "b", "--share", "0.1", "--store", "tape", *keys]) == 1
    assert "store: 'tape'" in capsys.readouterr().err


def test_terms_of_a_tenant_that_is_there_are_changed(
    keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--group", "team", "--ttl-s", "60"]
    assert run(["tenant", "add", "acme", "--share", "0.5", *told, *keys]) == 0
    before = TenantFile(Path(keys[1])).list()[0]
    capsys.readouterr()
    held = ["--no-evict", "--no-coded", "--store", "memory", "--share", "0.25", "--ttl-s", "0"]
    assert run(["tenant", "set", "acme", *held, *keys]) == 0
    assert "Changed acme: share, store, ttl_s, coded, evict." in capsys.readouterr().err
    tenant = TenantFile(Path(keys[1])).list()[0]
    assert (tenant.share, tenant.store, tenant.ttl_s) == (0.25, "memory", None)
    assert (tenant.coded, tenant.evict, tenant.group) == (False, False, "team")
    assert tenant.keys == before.keys
    assert run(["tenant", "set", "acme", "--evict", "--group", "", *keys]) == 0
    tenant = TenantFile(Path(keys[1])).list()[0]
    assert (tenant.evict, tenant.coded, tenant.group) == (True, False, None)
    capsys.readouterr()
    assert run(["tenant", "list", *keys]) == 0
    assert "never coded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["acme"], "terms: nothing is to change"),
        (["nobody", "--no-evict"], "name: there is no tenant nobody"),
        (["acme", "--share", "2"], "share"),
        (["acme", "--store", "tape"], "store: 'tape'"),
    ],
)
def test_what_cannot_be_changed_is_one_sentence(
    keys: list[str], capsys: pytest.CaptureFixture[str], told: list[str], sentence: str
) -> None:
    assert run(["tenant", "add", "acme", "--share", "0.5", *keys]) == 0
    capsys.readouterr()
    assert run(["tenant", "set", *told, *keys]) == 1
    assert sentence in capsys.readouterr().err
    assert TenantFile(Path(keys[1])).list()[0].share == 0.5


class Admin(BaseHTTPRequestHandler):
    """An admin port that knows one tenant."""

    def do_POST(self) -> None:
        known = self.path == "/purge?tenant=acme"
        known = known and self.headers["authorization"] == "Bearer a token of some length"
        body = b'{"pages":3,"votes":2}' if known else b'{"error":{"message":"no such tenant"}}'
        self.send_response(200 if known else 400)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return


def test_a_purge_goes_through_the_admin_port(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("a token of some length\n")
    with HTTPServer(("127.0.0.1", 0), Admin) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        at = ["--admin-port", str(server.server_port), "--admin-token-file", str(token)]
        assert run(["tenant", "purge", "acme", *at]) == 0
        assert "Purged acme: 3 pages, 2 votes." in capsys.readouterr().err
        assert run(["tenant", "purge", "ghost", *at]) == 1
        assert "no such tenant" in capsys.readouterr().err
        server.shutdown()
        thread.join()
    assert run(["tenant", "purge", "acme", *at]) == 1
    assert "no server answers" in capsys.readouterr().err
    assert run(["tenant", "purge", "acme"]) == 1
    assert "admin_token_file" in capsys.readouterr().err
    assert run(["tenant", "purge", "acme", "--admin-token-file", str(tmp_path / "gone")]) == 1
    assert "can't be read" in capsys.readouterr().err


def test_revoking_nobody_is_one_sentence(
    keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tenant", "revoke", "ghost", *keys]) == 1
    assert "ghost" in capsys.readouterr().err
