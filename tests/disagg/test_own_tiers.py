"""A decode worker's own tiers: what they hold is not sent again, what they lack is."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from kvkeep.cache.tiers import FirstOf, Room, TierUse
from kvkeep.disagg.totals import NOTHING, total
from kvkeep.engine.api import SamplingParams
from kvkeep.engine.given import Giver
from kvkeep.engine.options import KeyOptions, ShieldName
from kvkeep.sealing import KeyState, SealContext
from kvkeep.types import PageTag
from tests.disagg.crews import cluster_of
from tests.disagg.pairs import Pair, answers, engine_options, pair_of, until
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens
from tests.toys import DelayedTier

SOME = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = prompt_of(511, 5)
PLACES = ("memory:8MiB", "disk:{},16MiB")


@pytest.fixture(scope="module")
def wanted(tiny: dict[str, Path]) -> list[int]:
    core = core_for(tiny["qwen2"], chunk_tokens=128)
    return tokens(drive(core, [request(PROMPT, SOME)])["r"])


def tier_of(pair: Pair) -> TierUse:
    return pair.decode.core.caches.tier_uses()[0]


async def below(pair: Pair, pages: int) -> None:
    """Wait until the decode worker's tier holds so many pages or more, and leave none in memory."""
    await pair.quiet()
    await until(lambda: tier_of(pair).pages >= pages, 30)
    (manager,) = pair.decode.core.caches.managers.values()
    await until(lambda: manager.below is not None and not manager.below.copying, 30)
    manager.evict_pages("a", 99)


@pytest.mark.parametrize("place", PLACES)
async def test_own_pages_are_read_and_the_others_sent(
    tiny: dict[str, Path], tmp_path: Path, wanted: list[int], place: str
) -> None:
    engine = engine_options(tiny["qwen2"], shield="off")
    tiers = (place.format(tmp_path / "decode"),)
    other = msgspec.structs.replace(engine, tiers=tiers)
    async with pair_of(engine, other=other) as pair:
        await answers(pair.client, request(PROMPT[:200], SOME, id="begins"))
        await below(pair, 3)
        assert pair.receives.installed_pages == 3
        (got,) = await answers(pair.client, request(PROMPT, SOME, id="goes on"))
        assert tokens(got) == wanted
        assert tier_of(pair).hits == 3
        assert pair.receives.installed_pages == 3 + 4, "three of seven lay below"
        await below(pair, 7)
        (outlet,) = pair.sends.outlets
        frames = outlet.stats.sent_pages_frames
        (again,) = await answers(pair.client, request(PROMPT, SOME, id="again"))
        assert tokens(again) == wanted
        assert tier_of(pair).hits >= 3 + 7
        assert pair.receives.installed_pages == 3 + 4, "all seven lay below"
        assert outlet.stats.sent_pages_frames == frames + 1, "the rows behind them"
        await pair.quiet()
        assert not pair.faults()


@pytest.mark.parametrize("shield", ["off", "seal"])
async def test_a_cluster_that_comes_back_finds_what_its_workers_kept(
    tiny: dict[str, Path], tmp_path: Path, wanted: list[int], shield: ShieldName
) -> None:
    keys = KeyOptions(store=str(tmp_path / "sealing.json"))
    tiers = (f"disk:{tmp_path / 'pages'},16MiB",)
    engine = engine_options(tiny["qwen2"], shield=shield, keys=keys, tiers=tiers)
    for turn in ("first", "again"):
        with closing(Giver(engine, tiny["qwen2"])) as giver:
            others = {
                name: msgspec.structs.replace(
                    engine, tiers=(f"disk:{tmp_path / name},16MiB",), keys=giver.of(name)
                )
                for name in ("decode-0", "decode-1", "prefill-0", "prefill-1")
            }
        async with cluster_of(tiny["qwen2"], others=others) as cluster:
            (got,) = await answers(cluster.fleet, request(PROMPT, SOME, id=turn))
            assert tokens(got) == wanted
            await cluster.hands.quiet()
            hits = sum(use.hits for use in (await cluster.fleet.stats()).tiers)
            assert hits == (7 if turn == "again" else 0)


def context(number: int) -> SealContext:
    return SealContext("a", PageTag("s"), bytes([number]) * 32, b"m", b"d")


def test_the_second_of_two_tiers_is_asked_for_what_the_first_lacks_or_cannot_read() -> None:
    first, second = DelayedTier(1, fail=True), DelayedTier(0)
    both = FirstOf(first, second)
    first.kept[context(1)] = first.kept[context(2)] = [b"one"]
    second.kept[context(2)] = second.kept[context(3)] = [b"two"]
    assert [both.holds(context(at)) for at in range(5)] == [False, True, True, True, False]
    told: dict[int, bool] = {}
    came: list[bytes] = []
    for at in (1, 2, 3):
        both.fetch(
            context(at),
            (3,),
            lambda _, data: came.append(bytes(data)),
            lambda ok, at=at: told.__setitem__(at, ok),  # type: ignore[misc]
        )
    both.poll()
    assert told == {1: False, 2: True, 3: True}
    assert came == [b"two", b"two"]


def test_tiers_are_added_up_and_the_worst_surroundings_told() -> None:
    good, bad = KeyState("file", "locked", True, True), KeyState("file", "locked", True, False)
    one = TierUse("disk", 10, 4, 2, 1, 0, (("quota", 1),), (), 0, Room(500, False), good)
    other = TierUse("disk", 10, 1, 1, 2, 3, (("quota", 2),), (), 1, Room(900, True), bad)
    of = [msgspec.structs.replace(NOTHING, tiers=(use,)) for use in (one, other)]
    (found,) = total(of, ()).tiers
    assert found == TierUse("disk", 20, 5, 3, 3, 3, (("quota", 3),), (), 1, Room(900, True), bad)
