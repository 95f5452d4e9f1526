"""The admin port's `/ready`."""

from __future__ import annotations

import json

import pytest

from kvkeep.engine.api import TenantTerms
from kvkeep.errors import ConfigError
from kvkeep.server.options import ServerOptions
from kvkeep.server.tenants import SharingTerms
from tests.server.conftest import Start


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


async def test_the_last_bound_of_a_histogram_is_told_apart_from_none(start: Start) -> None:
    async with start() as server, server.admin() as admin:
        answer = await admin.get("/ready")
    ready = json.loads(answer.content, parse_constant=_no_constant)
    assert answer.headers["content-type"] == "application/json"
    for name in ("ttft_s", "tpot_s", "e2e_s", "step_s"):
        assert ready["engine"][name] == {
            "bounds": [0.1, 1.0, "+Inf"],
            "counts": [1, 2, 3],
            "total": 4.5,
        }
    assert ready["engine"]["finished"] == [["stop", 3], ["length", 4]]
    assert ready["model"]["eos_token_ids"] == [257]
    (tier,) = ready["engine"]["tiers"]
    assert tier["room"] == {"free_bytes": 1000, "read_only": False}
    assert (tier["keys"]["provider"], tier["keys"]["answering"]) == ("file", False)


async def test_a_purge_covers_a_tenant_and_its_children(start: Start) -> None:
    async with start() as server, server.admin() as admin:
        answer = await admin.post("/purge", params={"tenant": "gw"})
        assert (answer.status_code, answer.json()) == (200, {"pages": 9, "votes": 6})
        assert server.engine.purged == ["gw", "gw/a", "gw/b"]
        answer = await admin.post("/purge", params={"tenant": "gw/b"})
        assert (answer.json(), server.engine.purged[3:]) == ({"pages": 3, "votes": 2}, ["gw/b"])
        for query in ({"tenant": "nobody"}, {}):
            refused = await admin.post("/purge", params=query)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "tenant"


async def test_a_tenants_keys_go_before_its_pages(start: Start) -> None:
    order: list[str] = []

    def shred(tenant: str) -> bytes:
        if tenant == "nobody":
            raise ConfigError("name: there are no keys of a tenant nobody")
        order.append(tenant)
        return b'{"statement":"eA=="}'

    options = ServerOptions(poll_s=0.05, drain_s=0.2, shred=shred)
    async with start(options=options) as server, server.admin() as admin:
        server.engine.purged = order
        answer = await admin.post("/shred", params={"tenant": "gw"})
        assert answer.json() == {"pages": 9, "receipt": {"statement": "eA=="}}
        assert order == ["gw", "gw", "gw/a", "gw/b"]
        refused = await admin.post("/shred", params={"tenant": "nobody"})
        assert refused.status_code == 400
        assert "no keys of a tenant" in refused.json()["error"]["message"]
        left = await admin.post("/shred", params={"tenant": "left"})
        assert left.json()["pages"] == 0, "a tenant that was removed may have keys still"


async def test_a_server_that_seals_nothing_shreds_nothing(start: Start) -> None:
    async with start() as server, server.admin() as admin:
        refused = await admin.post("/shred", params={"tenant": "gw"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tenant")


async def test_the_policys_figures_are_on_the_admin_port_alone(start: Start) -> None:
    async with start() as server, server.admin() as admin, server.client() as client:
        page = (await admin.get("/metrics")).text
        assert (await client.get("/metrics")).status_code == 404
    for line in (
        'kvkeep:kv_cache_info{kv="bf16",model_name="tiny",window_tokens="0"} 1.0',
        'kvkeep:kv_encoded_pages_total{model_name="tiny"} 0.0',
        'kvkeep:evict_seen_tokens_total{model_name="tiny"} 0.0',
        'kvkeep:evict_masked_only_total{model_name="tiny"} 0.0',
        'kvkeep:sharing_epoch{model_name="tiny",policy="selective"} 7.0',
        'kvkeep:sharing_public_pages{model_name="tiny"} 12.0',
        'kvkeep:sharing_eps_per_day{model_name="tiny"} 2.5',
        'kvkeep:guard_shadowed_requests_total{model_name="tiny",tenant="acme"} 5.0',
        'kvkeep:guard_unshadowed_requests_total{model_name="tiny",tenant="acme"} 2.0',
        'kvkeep:guard_compared_tokens_total{model_name="tiny",tenant="acme"} 40.0',
        'kvkeep:guard_agreed_tokens_total{model_name="tiny",tenant="acme"} 38.0',
        'kvkeep:guard_kl_nats_total{model_name="tiny",tenant="acme"} 0.5',
        'kvkeep:guard_steps_back{model_name="tiny",tenant="acme"} 1.0',
        'kvkeep:tier_bytes{model_name="tiny",tier="disk"} 40.0',
        'kvkeep:tier_pages{model_name="tiny",tier="disk"} 4.0',
        'kvkeep:tier_hits_total{model_name="tiny",tier="disk"} 3.0',
        'kvkeep:tier_misses_total{model_name="tiny",tier="disk"} 2.0',
        'kvkeep:tier_drops_total{model_name="tiny",reason="queue"} 5.0',
        'kvkeep:tier_errors_total{kind="read:EIO",model_name="tiny"} 6.0',
        'kvkeep:tier_keys_answering{model_name="tiny",tier="disk"} 0.0',
        'kvkeep:tier_disk_free_bytes{model_name="tiny",tier="disk"} 1000.0',
        'kvkeep:tier_renewed_total{model_name="tiny",tier="disk"} 7.0',
        'kvkeep:sharing_scanned_bytes_total{model_name="tiny",tenant="acme"} 512.0',
        'kvkeep:sharing_alerts_total{action="notify",model_name="tiny",rule="probe share"} 1.0',
    ):
        assert line in page


async def test_the_engine_hears_each_tenants_terms_and_leaves_room_to_share(start: Start) -> None:
    async with start() as server, server.admin() as admin:
        assert server.engine.quotas[-1]["acme"] == 0.5
        sharing = SharingTerms(group="all", contribute=False, store="memory", ttl_s=60.0)
        server.file.add("new", share=0.1, sharing=sharing)
        assert (await admin.post("/reload")).status_code == 200
        assert server.engine.quotas[-1]["acme"] == pytest.approx(0.35)
        told = server.engine.terms[-1]
        assert told["new"] == TenantTerms(
            voter="new", group="all", contribute=False, store="memory", ttl_s=60.0
        )
        assert told["gw/a"] == TenantTerms(voter="gw")
