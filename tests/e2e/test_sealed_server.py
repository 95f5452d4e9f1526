"""A real server that seals: what its processes' memory holds, and shredding while it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Final

import pytest

from kvkeep.cli import run
from kvkeep.shield.keystore import KeyStore
from tests.e2e.test_tiers_server import ask
from tests.servers import Server, serving
from tests.shield.vaults import found_in, secrets_of

TENANTS: Final = {"harbour": 0.4, "library": 0.4}


def cmdline(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def soon_written(server: Server, store: Path) -> None:
    """Wait until both tenants have keys and nothing is on its way to the disk."""
    end = time.monotonic() + 30
    while len(KeyStore(store).read().owners) < len(TENANTS):
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1.0)


@pytest.mark.slow
def test_a_serving_tree_holds_no_key_and_forgets_a_shredded_tenant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tier = tmp_path / "tier"
    options = ("--kv-cache-memory-bytes", "128MiB", "--threads", "1", "--share", "isolate")
    with serving(tmp_path, TENANTS, *options, "--tier", f"disk:{tier},256MiB") as server:
        for tenant in TENANTS:
            ask(server, tenant)
        assert "seal: pages below memory open under" in server.log.read_text()
        store = tmp_path / "keys.json.sealing"
        soon_written(server, store)
        held = secrets_of((tmp_path / "keys.json.sealing.kek").read_bytes(), KeyStore(store))
        assert len(held) == 5, "the key file's, and two for each tenant"
        keepers = [p for p in server.tree() if b"kvkeep.shield.keeper" in cmdline(p)]
        assert len(keepers) == 1
        for process in server.tree():
            if process not in keepers:
                assert not found_in(process, held), cmdline(process)
            limits = Path(f"/proc/{process}/limits").read_text()
            if process in keepers:
                assert "Max core file size        0 " in limits
        admin = ["--admin-port", server.admin_url.rpartition(":")[2]]
        token = ["--admin-token-file", str(tmp_path / "token")]
        assert run(["tenant", "shred", "harbour", *admin, *token]) == 0
        assert json.loads(capsys.readouterr().out)["signature"]
        assert "harbour" not in KeyStore(store).read().owners
        assert ask(server, "harbour")[1] == 0
        assert ask(server, "library")[1] >= 128
