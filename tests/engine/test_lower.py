from __future__ import annotations

from pathlib import Path

import pytest

from kvkeep.cache.tier.lowest import TierSizes
from kvkeep.engine.lower import order_of, room_in, sizes_of, tier_of
from kvkeep.engine.options import EngineOptions, KeyOptions
from kvkeep.errors import ConfigError


def test_sizes_are_read() -> None:
    assert sizes_of([]) == (TierSizes(), None, None)
    assert sizes_of(["memory:4GiB"]) == (TierSizes(4 << 30, 0), None, None)
    both = sizes_of(["disk:/a,b/c,1.5GiB", "memory:512 MiB"])
    assert both == (TierSizes(512 << 20, 3 << 29), Path("/a,b/c"), None)
    url = "redis://10.0.0.7:6379/3"
    assert sizes_of([f"{url},64GiB"]) == (TierSizes(remote_bytes=64 << 30), None, url)
    assert sizes_of([f"{url.replace('redis', 'rediss')},1TiB"]).url == "rediss://10.0.0.7:6379/3"
    every = sizes_of([f"{url},3MiB", "disk:/a,2MiB", "memory:1MiB"])
    assert every == (TierSizes(1 << 20, 2 << 20, 3 << 20), Path("/a"), url)


@pytest.mark.parametrize(
    ("tier", "told"),
    [
        ("swift:host", "of no known kind"),
        ("redis://host", "needs a size"),
        ("redis://host,2", "needs a size"),
        ("", "of no known kind"),
        ("memory", "needs a size"),
        ("memory:4", "needs a size"),
        ("memory:4GB", "needs a size"),
        ("memory:-1GiB", "needs a size"),
        ("memory:512KiB", "1MiB or more"),
        ("disk:64GiB", "names no directory"),
        ("disk:,64GiB", "names no directory"),
        ("disk:/tier,", "needs a size"),
    ],
)
def test_what_is_wrong_is_told_with_what_is_right(tier: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"tier: .*{told}.*; use memory:4GiB or disk:DIR,64GiB"):
        sizes_of([tier])


def test_a_kind_is_named_once() -> None:
    with pytest.raises(ConfigError, match="tier: 'memory' is named twice"):
        sizes_of(["memory:1GiB", "memory:1GiB"])
    with pytest.raises(ConfigError, match="tier: 'disk' is named twice"):
        sizes_of(["disk:/a,1GiB", "disk:/b,1GiB"])
    with pytest.raises(ConfigError, match="tier: 'redis' is named twice"):
        sizes_of(["redis://a,1GiB", "redis://b,1GiB"])
    with pytest.raises(ConfigError, match="tier: 'rediss' is named twice"):
        sizes_of(["redis://a,1GiB", "rediss://b,1GiB"])


def test_a_server_gets_sealed_pages_alone() -> None:
    options = EngineOptions(model="m", tiers=("redis://127.0.0.1:1,1GiB",), shield="off")
    with pytest.raises(ConfigError, match="sealed pages alone"):
        tier_of(options, 1000)


def test_a_password_is_not_given_where_others_read_it(tmp_path: Path) -> None:
    keys = KeyOptions(store=str(tmp_path / "keys.json"))
    options = EngineOptions(model="m", tiers=("redis://:pw@127.0.0.1:1,1GiB",), keys=keys)
    with pytest.raises(ConfigError, match="REDIS_PASSWORD"):
        tier_of(options, 1000)


def test_a_tier_begins_asleep(tmp_path: Path) -> None:
    tiers = ("memory:1MiB", f"disk:{tmp_path},1MiB")
    options = EngineOptions(model="m", tiers=tiers, shield="off")
    tier = tier_of(options, 1000)
    assert tier is not None
    assert tier.asleep
    assert [use.tier for use in tier.uses()] == ["memory", "disk"]
    tier.close(1.0)
    assert tier_of(EngineOptions(model="m"), 1000) is None


def test_tiers_too_small_or_of_no_use_are_refused(tmp_path: Path) -> None:
    for tier in ("memory:1MiB", f"disk:{tmp_path},1MiB"):
        with pytest.raises(ConfigError, match=r"tier: .* holds no two pages of 600000 bytes"):
            tier_of(EngineOptions(model="m", tiers=(tier,)), 600_000)
    with pytest.raises(ConfigError, match="prefix_caching"):
        tier_of(EngineOptions(model="m", tiers=("memory:1GiB",), prefix_caching=False), 1000)


def test_pages_of_another_build_are_other_pages() -> None:
    options = EngineOptions(model="m")
    assert order_of(options, "avx2") != order_of(options, "avx512")
    assert order_of(options) != order_of(EngineOptions(model="m", weights="int8"))


def test_a_disk_that_takes_nothing_is_told_from_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = room_in(tmp_path / "not" / "there")
    assert room is not None
    assert room.free_bytes > 0
    assert not room.read_only
    monkeypatch.setattr("kvkeep.engine.lower.os.access", lambda *_: False)
    shut = room_in(tmp_path)
    assert shut is not None
    assert shut.read_only

    def gone(_: object) -> None:
        raise OSError

    monkeypatch.setattr("kvkeep.engine.lower.os.statvfs", gone)
    assert room_in(tmp_path) is None
