"""Placement depends on the tenant, the first page and the members alone, and moves little."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.disagg.options import Role
from kvkeep.disagg.router import Configuration, Placement, ranking, subject
from kvkeep.errors import ConfigError, EngineStopped

KEY = bytes(range(32))
ROLES: list[Role] = ["prefill", "decode"]
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
workers = st.sets(names, min_size=1, max_size=6)
tokens = st.lists(st.integers(0, (1 << 31) - 1), max_size=70)


def placement(members: set[str], key: bytes = KEY) -> Placement:
    return Placement(key, Configuration(0, frozenset(members), frozenset(members)))


@given(workers, names, tokens, st.sampled_from(ROLES))
@settings(max_examples=25)
def test_a_prompt_is_placed_by_its_tenant_and_first_page_alone(
    members: set[str], tenant: str, prompt: list[int], role: Role
) -> None:
    place = placement(members)
    found = place.worker(role, tenant, prompt)
    assert found in members
    other = placement(set(members))
    for i in range(5):
        other.worker(role, f"{tenant}{i}", [*prompt, i])
    assert other.worker(role, tenant, prompt) == found
    if len(prompt) >= 64:
        assert other.worker(role, tenant, [*prompt[:64], 1, 2, 3]) == found


@given(workers, names, names, tokens, st.sampled_from(ROLES))
@settings(max_examples=25)
def test_who_joins_or_leaves_moves_its_own_prompts_alone(
    members: set[str], newcomer: str, tenant: str, prompt: list[int], role: Role
) -> None:
    place = placement(members)
    before = place.worker(role, tenant, prompt)
    place.join(role, newcomer)
    assert place.worker(role, tenant, prompt) == before, "not within the epoch"
    assert place.end_epoch().epoch == 1
    assert place.worker(role, tenant, prompt) in {before, newcomer}
    if newcomer not in members:
        place.leave(role, newcomer)
        place.end_epoch()
        assert place.worker(role, tenant, prompt) == before


@given(st.sets(names, min_size=2, max_size=6), names, tokens)
@settings(max_examples=25)
def test_a_dead_worker_is_passed_over_at_once_and_must_join_again(
    members: set[str], tenant: str, prompt: list[int]
) -> None:
    place = placement(members)
    first, second = ranking(KEY, members, "decode", subject(tenant, prompt))[:2]
    place.died(first)
    assert place.worker("decode", tenant, prompt) == second
    place.end_epoch()
    assert place.worker("decode", tenant, prompt) == second
    place.join("decode", first)
    place.end_epoch()
    assert place.worker("decode", tenant, prompt) == first


def test_prompts_spread_evenly_and_roles_apart() -> None:
    members = {f"worker-{i}" for i in range(4)}
    place = placement(members)
    prompts = [(f"tenant-{i % 40}", [i]) for i in range(4000)]
    placed = [place.worker("decode", *one) for one in prompts]
    assert all(abs(count - 1000) < 150 for count in Counter(placed).values())
    pairs = Counter(zip(placed, (place.worker("prefill", *one) for one in prompts), strict=True))
    assert len(pairs) == 16
    assert min(pairs.values()) > 150, "one role's choice says nothing of the other's"


def test_another_key_places_otherwise() -> None:
    members = {f"worker-{i}" for i in range(4)}
    one, other = placement(members), placement(members, bytes(32))
    placed = [(one.worker("decode", "a", [i]), other.worker("decode", "a", [i])) for i in range(99)]
    assert sum(a == b for a, b in placed) < 60


def test_tenants_and_tokens_are_told_apart_by_length() -> None:
    assert subject("a", [0x62]) != subject("ab", [])
    assert subject("a", []) != subject("", [0x61])


def test_nobody_left_is_said() -> None:
    place = placement({"only"})
    place.died("only")
    with pytest.raises(EngineStopped, match="no decode worker is left"):
        place.worker("decode", "a", [1])


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="key: 3 bytes"):
        placement({"a"}, b"abc")
