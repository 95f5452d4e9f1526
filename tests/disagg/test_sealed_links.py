"""Frames between workers open for the two ends of their transfer, and for nobody else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kvkeep.disagg import split
from kvkeep.disagg.prompt import PromptPages
from kvkeep.disagg.wire import Block
from kvkeep.engine import messages as m
from kvkeep.engine.api import GenerateRequest, Handover, SamplingParams
from kvkeep.engine.options import EngineOptions
from kvkeep.engine.sealers import TransferSeal, transfer_seal_of
from kvkeep.errors import SealError
from kvkeep.sealing import PageSealer, SealContext, layers_of
from kvkeep.shield.transfer import TransferKeys
from kvkeep.types import PageTag
from tests.disagg.crews import cluster_of
from tests.disagg.pairs import answers, engine_options, pair_of
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens

SOME = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
PROMPT = prompt_of(400, 5)
KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
CONTEXT = SealContext("a", PageTag("s"), b"c" * 32, b"m", b"d")
SEAL = transfer_seal_of(EngineOptions(model="", shield="seal"))


def opened(sealer: PageSealer, frame: bytes | memoryview) -> list[bytes]:
    return [
        bytes(one) for one in layers_of(sealer.open(CONTEXT, memoryview(frame), (3, 2)), (3, 2))
    ]


def test_a_frame_opens_under_its_transfers_key_alone() -> None:
    frame = SEAL.sealer(KEY).seal(CONTEXT, b"abcde", (3, 2))
    assert opened(SEAL.sealer(KEY), frame) == [b"abc", b"de"]
    with pytest.raises(SealError, match="another key"):
        opened(SEAL.sealer(OTHER), frame)


def test_a_flip_of_any_byte_of_a_frame_opens_nothing() -> None:
    frame = bytes(SEAL.sealer(KEY).seal(CONTEXT, b"abcde", (3, 2)))
    for at in range(len(frame)):
        changed = bytearray(frame)
        changed[at] ^= 1
        with pytest.raises(SealError):
            opened(SEAL.sealer(KEY), bytes(changed))


@pytest.mark.parametrize("key", [b"", KEY[:16], KEY + KEY])
def test_what_is_no_key_seals_nothing(key: bytes) -> None:
    with pytest.raises(SealError, match="a transfer has no key"):
        TransferKeys(key)


def test_without_sealing_no_key_is_asked_for() -> None:
    plain = transfer_seal_of(EngineOptions(model="", shield="off"))
    frame = plain.sealer(b"").seal(CONTEXT, b"abcde", (3, 2))
    assert opened(plain.sealer(b""), frame) == [b"abc", b"de"]


async def stolen(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Answer a request twice; tell which frames of the first one's way open as the second's."""
    first: dict[tuple[int, ...], bytes] = {}
    found: list[bool] = []
    opens = PromptPages.open

    def spied(pages: PromptPages, block: Block, frame: memoryview) -> list[memoryview]:
        place = block[1:5]
        if place in first:
            try:
                opens(pages, block, memoryview(first[place]))
            except SealError:
                found.append(False)
            else:
                found.append(True)
        else:
            first[place] = bytes(frame)
        return opens(pages, block, frame)

    monkeypatch.setattr(PromptPages, "open", spied)
    async with pair_of(engine_options(model, shield="seal"), whole=True) as pair:
        for name in ("first", "second"):
            await answers(pair.client, request(PROMPT, SOME, id=name))
            await pair.quiet()
            for manager in pair.decode.core.caches.managers.values():
                manager.evict_pages("a", 99)
        assert not pair.faults()
        assert pair.receives.installed_pages == 2 * (len(PROMPT) // 64)
    return found


async def test_a_frame_of_one_request_does_not_open_as_the_same_prompts_next_one(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await stolen(tiny["qwen2"], monkeypatch)
    assert found
    assert not any(found)


async def test_one_key_for_all_transfers_would_be_seen(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvkeep.disagg.split.secrets.token_bytes", bytes)
    found = await stolen(tiny["qwen2"], monkeypatch)
    assert found
    assert all(found)


async def test_a_worker_that_uses_other_keys_costs_time_and_no_token(
    tiny: dict[str, Path],
) -> None:
    engine = engine_options(tiny["qwen2"], shield="seal")
    wanted = tokens(drive(core_for(tiny["qwen2"], chunk_tokens=128), [request(PROMPT, SOME)])["r"])
    async with pair_of(engine) as pair:
        pair.receives._seal = TransferSeal("seal", lambda _: SEAL.sealer(OTHER))
        (got,) = await answers(pair.client, request(PROMPT, SOME))
        assert tokens(got) == wanted
        assert pair.receives.installed_pages == 0
        assert pair.faults()["pages that do not open"] > 0
        await pair.quiet()


async def test_a_request_without_a_key_hands_nothing_over(tiny: dict[str, Path]) -> None:
    engine = engine_options(tiny["qwen2"], shield="seal")
    async with pair_of(engine) as pair:
        link = (await pair.client._prefill.info()).link
        own = Handover(role="decode", link=link)
        stream = pair.client._decode.submit(
            msgspec.structs.replace(request(PROMPT, SOME), handover=own)
        )
        pair.client._decode.begin("r", (), ())
        got = [chunk async for chunk in stream]
        assert len(tokens(got)) == SOME.max_tokens
        assert pair.faults() == {"nothing is handed over": 1}
        assert pair.receives.installed_pages == 0


async def test_each_transfers_key_is_told_to_its_two_ends_alone(tiny: dict[str, Path]) -> None:
    engine = engine_options(tiny["qwen2"], shield="seal")
    names = [f"{role}-{number}" for role in ("prefill", "decode") for number in (0, 1)]
    asked = [request(prompt_of(200, seed), SOME, id=str(seed)) for seed in range(6)]
    heard: dict[bytes, list[str]] = defaultdict(list)
    async with cluster_of(tiny["qwen2"], others=dict.fromkeys(names, engine)) as cluster:

        def listens(name: str) -> Callable[[m.Command], None]:
            def note(command: m.Command) -> None:
                if isinstance(command, m.Submit):
                    heard[_key(command.request)].append(name)

            return note

        for name, transport in cluster.hands.transports.items():
            transport.heard = listens(name)
        await answers(cluster.fleet, *asked)
        await cluster.hands.quiet()
        installed = [getattr(worker.side, "installed_pages", 0) for worker in cluster.hands.alive()]
    assert sum(installed) == len(asked) * (200 // 64)
    assert len(heard) == len(asked), "a key each"
    assert all(len(key) == split.KEY_BYTES for key in heard)
    for ends in heard.values():
        assert sorted(name.partition("-")[0] for name in ends) == ["decode", "prefill"]


def _key(spec: GenerateRequest) -> bytes:
    assert spec.handover is not None
    return spec.handover.key
