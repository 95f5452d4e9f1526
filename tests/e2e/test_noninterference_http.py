"""Two worlds over real HTTP: every byte an attacker is sent is the same with and without victims.

In each world the same server runs, with votes on disk. The attackers' turns are told one after the
other; the victims' run beside them. Epochs end and servers restart in between.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from kvkeep.engine.options import EngineOptions, EvictName, KvName, PolicyName, SharingOptions
from kvkeep.models.text import TextModel
from kvkeep.server.tenants import SharingTerms, TenantFile
from tests.e2e.here import Host, serving_elsewhere, serving_here
from tests.e2e.wires import BODIES, CAP, Told, Wire

K: Final = 4
BYSTANDERS: Final = tuple(f"b{i}" for i in range(K + 1))
SUBJECTS: Final = ("gate/ann", "gate/ben", "gate/cat")
"""Three people behind one gateway's key: one voter."""
CASTS: Final = (
    (("x0",), ("v0", *SUBJECTS)),
    (("x0", "x1"), SUBJECTS),
    (SUBJECTS[:1], SUBJECTS[1:]),
)
"""Attackers and victims: together k - 1 tenants, in both ways; people behind one key."""
SHARE: Final = 0.08
WORDS: Final = "The opening hours of the {} depend on the season and on the weather. "
PLACES: Final = ("library", "harbour", "market")
"""What is written of: the first two by victims and attackers, the last by everybody."""
ASKED: Final = (*BODIES, "chat", "crowd", "leave")


class Turn(NamedTuple):
    """One thing that a tenant does, or an epoch's end, or a restart."""

    who: str
    how: str = ""
    which: int = 0
    length: int = 0


class Setup(NamedTuple):
    """What a world is started with."""

    model: Path
    policy: PolicyName = "selective"
    kv: KvName = "bf16"
    evict: EvictName = "off"
    elsewhere: bool = False
    """Whether it runs in processes of its own."""


class World:
    """A server over its restarts, and what the attackers are told."""

    def __init__(self, setup: Setup, folder: Path, cast: int) -> None:
        self._setup = setup
        self._attackers = CASTS[cast][0]
        file = TenantFile(folder / "keys.json")
        self._file = file
        self._keys = {
            name: file.add(
                name,
                share=SHARE,
                concurrency=CAP,
                gateway=name == "gate",
                sharing=SharingTerms(group="all"),
            ).text
            for name in ("x0", "x1", "v0", "gate", *BYSTANDERS)
        }
        text = TextModel.load(setup.model)
        self._texts = [text.encode(WORDS.format(name) * 40)[:600] for name in PLACES]
        self._options = EngineOptions(
            model=str(setup.model),
            served_name="tiny",
            threads=2,
            kv_cache_bytes=18 << 20,
            kv=setup.kv,
            kv_auto_tokens=400,
            evict=setup.evict,
            evict_window=None if setup.evict == "off" else 64,
            share=SharingOptions(
                policy=setup.policy, k=K, state=str(folder / "votes"), life_epochs=10_000
            ),
        )
        self.told: list[Told] = []
        self.saved: list[int] = []
        """Tokens of the attackers' last prompts that were not computed: what a clock would tell."""

    async def play(self, turns: Sequence[Turn]) -> bytes:
        """Return all that the attackers were told."""
        left = list(turns)
        while left:
            async with self._started() as (host, wires):
                beside: list[asyncio.Task[Told]] = []
                while left and (turn := left.pop(0)).who != "restart":
                    await self._turn(host, wires, turn, beside)
                await asyncio.gather(*beside)
                if not left:
                    await self._end(host, wires)
        return repr((self.told, self.saved)).encode()

    @asynccontextmanager
    async def _started(self) -> AsyncIterator[tuple[Host, dict[str, Wire]]]:
        """Start a server; the bystanders make their text public."""
        async with AsyncExitStack() as stack:
            host = await stack.enter_async_context(self._host())
            wires = {name: Wire(host.url, key) for name, key in self._keys.items()}
            for subject in SUBJECTS:
                gate, _, person = subject.partition("/")
                wires[subject] = Wire(host.url, self._keys[gate], person)
            for wire in wires.values():
                stack.push_async_callback(wire.close)
            for name in BYSTANDERS:
                assert (await wires[name].ask("plain", self._texts[2]))[0] == 200
            await host.end_epoch()
            await host.end_epoch()
            yield host, wires

    def _host(self) -> AbstractAsyncContextManager[Host]:
        options = self._options
        if not self._setup.elsewhere:
            return serving_here(options, self._file.path)
        return serving_elsewhere(
            self._file,
            self._keys,
            *("--model", options.model, "--served-model-name", "tiny", "--threads", "2"),
            *("--kv-cache-memory-bytes", str(options.kv_cache_bytes), "--share-epoch-s", "0.5"),
        )

    async def _turn(
        self, host: Host, wires: dict[str, Wire], turn: Turn, beside: list[asyncio.Task[Told]]
    ) -> None:
        if turn.who == "epoch":
            await asyncio.gather(*beside)
            await host.end_epoch()
        elif turn.who in self._attackers:
            self.told.append(await self._ask(wires[turn.who], turn))
            if turn.how in ("crowd", "leave"):
                await host.quiet()
        else:
            beside.append(asyncio.create_task(self._ask(wires[turn.who], turn)))

    async def _ask(self, wire: Wire, turn: Turn) -> Told:
        prompt = self._texts[turn.which][: turn.length]
        match turn.how:
            case "chat":
                return await wire.chat(WORDS.format(PLACES[turn.which]) * (turn.length // 20))
            case "crowd":
                return await wire.crowd(prompt)
            case "leave":
                return await wire.leave(prompt)
        return await wire.ask(turn.how, prompt)

    async def _end(self, host: Host, wires: dict[str, Wire]) -> None:
        """Let two epochs end, and ask once more for every text with nobody else there."""
        await host.end_epoch()
        await host.end_epoch()
        for name in self._attackers:
            for prompt in self._texts:
                before = await host.saved_tokens()
                self.told.append(await wires[name].ask("stream", prompt))
                await host.quiet()
                self.saved.append(await host.saved_tokens() - before)


def script(seed: int, cast: int) -> list[Turn]:
    """Return turns in which victims and attackers send two texts, bystanders and all the third."""
    draw = random.Random(seed)
    attackers, victims = CASTS[cast]
    actors = (*attackers, *attackers, *victims, *BYSTANDERS[:2], "epoch")
    turns = [Turn("restart")] if seed % 3 == 1 else []
    for _ in range(16):
        who = draw.choice(actors)
        which = 2 if who in BYSTANDERS else draw.choice([0, 0, 1, 2])
        how = draw.choice(ASKED if who in attackers else ("plain", "stream", "batch", "leave"))
        turns.insert(
            draw.randrange(len(turns) + 1), Turn(who, how, which, draw.choice([300, 520, 600]))
        )
    secret = [Turn(name, "plain", 0, 600) for name in victims]
    return [*turns, *secret, Turn("epoch"), Turn("epoch")]


async def same(setup: Setup, folder: Path, seed: int) -> bool:
    cast = seed % 2
    return await told_the_same(setup, folder, cast, script(seed, cast))


async def told_the_same(setup: Setup, folder: Path, cast: int, turns: Sequence[Turn]) -> bool:
    worlds = []
    for name, played in (
        ("with", turns),
        ("without", [turn for turn in turns if turn.who not in CASTS[cast][1]]),
    ):
        (folder / name).mkdir(parents=True)
        worlds.append(await World(setup, folder / name, cast).play(played))
    return worlds[0] == worlds[1]


@pytest.mark.parametrize("seed", [1, pytest.param(0, marks=pytest.mark.slow)])
async def test_an_attacker_is_sent_the_same_bytes_with_and_without_victims(
    tiny: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    assert await same(Setup(tiny["llama"]), tmp_path, seed)


@pytest.mark.slow
async def test_people_behind_one_key_are_sent_nothing_of_each_other(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    """While their tenant's share holds what all of them send."""
    ann, *others = SUBJECTS
    turns = [*(Turn(name, "plain", 0, 300) for name in others), Turn("epoch")]
    turns += [Turn(ann, how, 0, 300) for how in ("stream", "batch", "echo", "plain")]
    assert await told_the_same(Setup(tiny["llama"]), tmp_path, 2, turns)


async def test_it_is_sent_others_where_everything_is_shared(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    assert not await same(Setup(tiny["llama"], "share_all"), tmp_path, 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("policy", "kv", "evict", "runs"),
    [
        ("selective", "bf16", "off", 50),
        ("dp", "bf16", "off", 10),
        ("isolate", "bf16", "off", 10),
        ("selective", "k2v2", "off", 20),
        ("selective", "bf16", "corm", 20),
    ],
)
async def test_it_is_sent_the_same_bytes_at_length(
    tiny: dict[str, Path],
    tmp_path: Path,
    policy: PolicyName,
    kv: KvName,
    evict: EvictName,
    runs: int,
) -> None:
    setup = Setup(tiny["llama"], policy, kv, evict)
    for seed in range(runs):
        assert await same(setup, tmp_path / str(seed), seed), seed


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_it_is_sent_the_same_bytes_by_processes_that_keep_the_time(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    for seed in range(3):
        setup = Setup(tiny["llama"], elsewhere=True)
        assert await same(setup, tmp_path / str(seed), seed), seed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_the_snapshot_is_used_in_these_tests(
    tiny: dict[str, Path], tmp_path: Path, *, elsewhere: bool
) -> None:
    world = World(Setup(tiny["llama"], elsewhere=elsewhere), tmp_path, 0)
    await world.play([Turn("restart"), Turn("epoch")])
    assert world.saved == [0, 0, 512]
