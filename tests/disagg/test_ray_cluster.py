"""A Ray that others could use is refused, and says why."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvkeep.disagg import listening, ray_cluster
from kvkeep.disagg.listening import exposed, family
from kvkeep.disagg.options import LinkOptions, TlsFiles
from kvkeep.disagg.ray_cluster import check_address, check_cluster, check_links, joined, uses_tls
from kvkeep.errors import ConfigError
from tests.disagg.rays import ray_nodes

TOKEN = {"RAY_AUTH_MODE": "token"}


@pytest.mark.parametrize(
    ("address", "environment", "why"),
    [
        ("nowhere", TOKEN, "neither 'auto' nor HOST:PORT"),
        (":6379", TOKEN, "neither 'auto' nor HOST:PORT"),
        ("127.0.0.1:6379", {}, "token authentication is off; set RAY_AUTH_MODE=token"),
        ("127.0.0.1:6379", {"RAY_AUTH_MODE": "disabled"}, "token authentication is off"),
        ("192.0.2.7:6379", TOKEN, "192.0.2.7 is another machine .*RAY_USE_TLS=1"),
        ("192.0.2.7:6379", {**TOKEN, "RAY_USE_TLS": "1"}, "RAY_TLS_SERVER_CERT names no file"),
    ],
)
def test_an_address_is_refused_before_it_is_dialled(
    address: str, environment: dict[str, str], why: str
) -> None:
    with pytest.raises(ConfigError, match=f"cluster: .*{why}"):
        check_address(address, environment)


def test_an_address_that_may_be_dialled(tmp_path: Path) -> None:
    (file := tmp_path / "file.pem").touch()
    tls = {"RAY_USE_TLS": "1", **dict.fromkeys(ray_cluster.TLS_FILES, str(file))}
    check_address("auto", {})
    check_address("127.0.0.1:6379", TOKEN)
    check_address("192.0.2.7:6379", {**TOKEN, **tls})
    assert uses_tls(tls)
    assert not uses_tls({"RAY_USE_TLS": "0"})


def fake(host: str, webui_url: str = "", *, alive: bool = True) -> Any:
    """Return what `ray` says of a cluster of one node."""
    node = SimpleNamespace(address_info={"webui_url": webui_url}, gcs_address="127.0.0.1:1")
    worker = SimpleNamespace(_global_node=node)
    nodes = [{"NodeManagerAddress": host, "Alive": alive}]
    return SimpleNamespace(nodes=lambda: nodes, _private=SimpleNamespace(worker=worker))


def test_a_cluster_is_refused_for_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "check_token", lambda _: None)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    address = "127.0.0.1:6379"
    with pytest.raises(
        ConfigError, match=r"node 192.0.2.7 listens beyond this machine without TLS"
    ):
        check_cluster(fake("192.0.2.7"), address)
    with pytest.raises(ConfigError, match="dashboard is on"):
        check_cluster(fake("127.0.0.1", "127.0.0.1:8265"), address)
    check_cluster(fake("127.0.0.1"), address)
    check_cluster(fake("192.0.2.7", alive=False), address)
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        port = everywhere.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"listens at 0.0.0.0:{port}"):
            check_cluster(fake("127.0.0.1"), "auto")
    check_cluster(fake("127.0.0.1"), "auto")


def test_links_between_machines_need_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, refused in (("127.0.0.1", False), ("192.0.2.7", True)):
        monkeypatch.setattr(ray_cluster, "import_module", lambda _, host=host: fake(host))
        check_links(LinkOptions(tls=TlsFiles(certificate="c", key="k", authority="a")))
        if refused:
            with pytest.raises(ConfigError, match="cluster_certificate: workers on several"):
                check_links(LinkOptions())
            with pytest.raises(ConfigError, match="cluster_shared_memory: workers on several"):
                check_links(LinkOptions(listen="shm:///run/links/"))
        else:
            check_links(LinkOptions())
            check_links(LinkOptions(listen="shm:///run/links/"))


def test_what_a_process_listens_at_is_read_from_the_system() -> None:
    own = os.getpid()
    before = exposed([own])
    with socket.socket() as here, socket.socket(socket.AF_INET6) as there:
        here.bind(("127.0.0.1", 0))
        here.listen()
        assert exposed([own]) == before
        there.bind(("::", 0))
        there.listen()
        assert exposed([own]) == sorted([*before, f":::{there.getsockname()[1]}"])
    assert exposed([own]) == before
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in family(own)
        child.communicate(b"\n")
    assert exposed([child.pid]) == []


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"install kvkeep\[cluster\]"), joined("auto"):
        pass
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_what_can_not_be_read_is_not_taken_for_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "PROC", tmp_path)
    with pytest.raises(ConfigError, match=r"can't read .*tcp .*nothing tells what listens"):
        exposed([os.getpid()])


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_ray_that_lets_everybody_in_is_refused() -> None:
    refused = pytest.raises(ConfigError, match="asked without a token and did not refuse")
    with ray_nodes(1, {"RAY_AUTH_MODE": "disabled"}) as address, refused:
        ray_cluster.check_token(address)
