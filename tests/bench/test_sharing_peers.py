from __future__ import annotations

import json

import httpx
import pytest

from bench import harness, sharing, sharing_peers
from bench.sharing_attack import APART, PRIVATE
from bench.sharing_peers import Salting, Vllm
from bench.sharing_target import Counted, total
from kvkeep.errors import ConfigError
from tools import sharing_results

PAGE = """
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="demo"} 30.0
vllm:prefix_cache_hits_total{engine="1",model_name="demo"} 10.0
vllm:prefix_cache_queries_total{engine="0"} 1e+02
vllm:external_prefix_cache_hits_total{engine="0"} 7.0
"""


class Listening(httpx.AsyncBaseTransport):
    def __init__(self) -> None:
        self.seen: list[httpx.Request] = []
        self.closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.seen.append(request)
        return httpx.Response(200, json={})

    async def aclose(self) -> None:
        self.closed = True


def client(inner: Listening) -> httpx.AsyncClient:
    salts = {"key of a": "salt of a", "key of b": "salt of b"}
    return httpx.AsyncClient(base_url="http://127.0.0.1:1", transport=Salting(inner, salts))


async def test_each_key_has_its_salt_whatever_the_client_says() -> None:
    inner = Listening()
    body = {"prompt": [1, 2], "cache_salt": "salt of b"}
    async with client(inner) as http:
        for name in ("a", "b"):
            headers = {"Authorization": f"Bearer key of {name}"}
            await http.post("/v1/completions", json=body, headers=headers)
    sent = [json.loads(request.content) for request in inner.seen]
    assert [one["cache_salt"] for one in sent] == ["salt of a", "salt of b"]
    assert all(one["prompt"] == [1, 2] for one in sent)
    lengths = [int(request.headers["content-length"]) for request in inner.seen]
    assert lengths == [len(request.content) for request in inner.seen]
    assert inner.closed


async def test_without_a_known_key_nothing_is_sent_unsalted() -> None:
    inner = Listening()
    async with client(inner) as http:
        for headers in ({}, {"Authorization": "Bearer key of nobody"}):
            reply = await http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
            assert reply.status_code == 401
        assert (await http.get("/v1/models")).status_code == 200
    assert [request.method for request in inner.seen] == ["GET"]


def test_a_server_as_it_comes_is_sent_what_clients_send() -> None:
    plain = Vllm("http://127.0.0.1:1", ("a",), salted=False)
    assert isinstance(plain.transport(), httpx.AsyncHTTPTransport)
    assert isinstance(Vllm(plain.url, ("a",), salted=True).transport(), Salting)


def test_counters_are_summed_over_their_labels_and_no_others() -> None:
    assert total(PAGE, "vllm:prefix_cache_hits") == 40.0
    assert total(PAGE, "vllm:prefix_cache_queries") == 100.0
    with pytest.raises(RuntimeError, match="no vllm:other_total"):
        total(PAGE, "vllm:other")


def test_what_a_peer_shares_at_a_time_is_read_from_its_metrics() -> None:
    info = 'vllm:cache_config_info{a="1",block_size="128",block_size_x="7",engine="0"} 1.0'
    assert sharing_peers.block_tokens(f"x\n{info}\n") == 128
    with pytest.raises(RuntimeError, match="no vllm:cache_config_info"):
        sharing_peers.block_tokens(PAGE)


def test_ratios_are_of_what_was_counted_between() -> None:
    grown = Counted(50.0, 200.0, 3.0, 40.0).since(Counted(10.0, 100.0, 1.0, 20.0))
    assert (grown.hit_ratio, grown.scan_share) == (0.4, 0.1)
    assert Counted(1.0, 2.0).scan_share == 0.0


def test_parts_and_ways_of_a_peer_can_be_measured_alone() -> None:
    def asked(*only: str, peers: tuple[str, ...] = ("vllm",)) -> tuple[list[str], list[str]]:
        return sharing_peers.asked(harness.Options(peers=peers, only=only))

    assert asked() == (["replay", "audit"], ["vllm", "vllm_salted"])
    assert asked("audit", "vllm_salted") == (["audit"], ["vllm_salted"])
    with pytest.raises(ConfigError, match="no part 'selective' of a peer"):
        asked("selective")
    with pytest.raises(ConfigError, match="'openvino' is not measured here"):
        asked(peers=("vllm", "openvino"))


def test_a_peer_takes_the_policies_place() -> None:
    with pytest.raises(ConfigError, match="peer: 'other'"):
        sharing.measure(harness.Options(peers=("other",)))


def test_what_a_peer_is_called_is_known_where_results_are_read() -> None:
    assert {*sharing_peers.WAYS} <= {*sharing_results.ORDER}
    assert {*sharing_peers.WAYS} >= APART - PRIVATE
