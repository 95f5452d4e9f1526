"""Workers of a role lie on as many nodes as there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvkeep.disagg.places import Places


def node(name: str, *, alive: bool = True, **resources: float) -> Mapping[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_workers_of_a_role_are_spread() -> None:
    places, nodes = Places(), [node("a"), node("b"), node("c", alive=False)]
    taken = [places.take(number, "decode", 0, nodes) for number in range(4)]
    assert sorted(filter(None, taken)) == ["a", "a", "b", "b"]
    others = [places.take(number, "prefill", 0, nodes) for number in range(4, 6)]
    assert sorted(filter(None, others)) == ["a", "b"]


def test_one_who_comes_back_goes_where_the_fewest_are() -> None:
    places, nodes = Places(), [node("a"), node("b")]
    assert [places.take(worker, "decode", 0, nodes) for worker in "vw"] == ["a", "b"]
    places.leave("w")
    places.leave("w")
    assert places.take("x", "decode", 0, nodes) == "b"


def test_nodes_that_declare_a_role_have_it_alone() -> None:
    places = Places()
    nodes = [node("a"), node("b", kvkeep_prefill=1), node("c", kvkeep_prefill=1)]
    assert {places.take(n, "prefill", 0, nodes) for n in range(4)} == {"b", "c"}
    assert places.take("d", "decode", 0, nodes) == "a"


def test_where_no_gpu_is_left_ray_waits_for_one() -> None:
    places, nodes = Places(), [node("a"), node("b", GPU=1)]
    assert places.take("v", "decode", 1, nodes) == "b"
    assert places.take("w", "decode", 1, nodes) is None
    places.leave("v")
    assert places.take("x", "prefill", 1, nodes) == "b"
