"""Two engines joined answer as one does, and say where the pages were computed."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from kvkeep.engine import messages as m
from kvkeep.engine.api import (
    Chunk,
    FinishReason,
    Handover,
    SamplingParams,
    TenantTerms,
)
from kvkeep.engine.engine import Output
from kvkeep.engine.options import SharingOptions
from tests.disagg.pairs import QUICK, Pair, answer, answers, engine_options, pair_of, until
from tests.e2e.test_composition import prompt_of
from tests.engines import core_for, drive, request, tokens

SOME = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True, logprobs=2)
ONE = msgspec.structs.replace(SOME, max_tokens=1)
PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((70, 200, 400, 511))]


def alone(model: Path, params: SamplingParams, **options: Any) -> list[list[Chunk]]:
    """Return one engine's answers to the prompts."""
    core = core_for(model, chunk_tokens=128, threads=1, **options)
    asked = [request(prompt, params, id=str(i)) for i, prompt in enumerate(PROMPTS)]
    told = drive(core, asked)
    return [told[str(i)] for i in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("kv", "evict"), [("bf16", "off"), ("k2v2", "off"), ("bf16", "corm"), ("auto", "off")]
)
async def test_two_engines_answer_as_one(tiny: dict[str, Path], kv: str, evict: str) -> None:
    forms = {"kv": kv, "evict": evict, "kv_auto_tokens": 300}
    wanted = alone(tiny["qwen2"], DRAWN, **forms)
    async with pair_of(engine_options(tiny["qwen2"], shield="off", **forms)) as pair:
        asked = [request(prompt, DRAWN, id=str(i)) for i, prompt in enumerate(PROMPTS)]
        got = await answers(pair.client, *asked)
        assert [tokens(chunks) for chunks in got] == [tokens(chunks) for chunks in wanted]
        assert ["".join(c.text for c in one) for one in got] == [
            "".join(c.text for c in one) for one in wanted
        ]
        assert [[p for c in one for p in c.logprobs] for one in got] == [
            [p for c in one for p in c.logprobs] for one in wanted
        ]
        await pair.quiet()
        whole = 128 if kv == "k2v2" else 64
        found = sum(len(prompt) // whole * whole for prompt in PROMPTS) // 64
        exact = evict == "off" and kv != "auto"  # what is evicted of a prompt is computed here
        least = found if exact else 1
        assert least <= pair.receives.installed_pages <= found
        assert not pair.faults()


SELECTIVE = SharingOptions(policy="selective", k=2, epoch_s=0.2)


async def test_sealed_on_the_wire_and_shared_selectively(tiny: dict[str, Path]) -> None:
    wanted = alone(tiny["qwen2"], SOME, kv="k2v2")
    engine = engine_options(tiny["qwen2"], kv="k2v2", shield="seal", share=SELECTIVE)
    terms = {name: TenantTerms(voter=name, group="g") for name in ("a", "b", "c")}
    async with pair_of(engine) as pair:
        await pair.client.set_tenants(dict.fromkeys(terms, 0.3), terms)
        for tenant in terms:
            asked = [
                request(prompt, SOME, id=f"{tenant}{i}", tenant=tenant)
                for i, prompt in enumerate(PROMPTS)
            ]
            got = await answers(pair.client, *asked)
            assert [tokens(chunks) for chunks in got] == [tokens(chunks) for chunks in wanted]
            await asyncio.sleep(0.3)  # an epoch ends in both engines
        await pair.quiet()
        assert pair.receives.installed_pages > 0
        assert not pair.faults()
        assert all(outlet.stats.name == "tcp" for outlet in pair.sends.outlets)


@pytest.mark.parametrize("policy", ["isolate", "selective", "dp", "salt", "safekv", "share_all"])
async def test_every_policy_answers_as_one_engine_with_all_techniques(
    tiny: dict[str, Path], policy: str
) -> None:
    forms = {"kv": "k2v2", "evict": "corm"}
    wanted = alone(tiny["qwen2"], DRAWN, **forms)
    share = msgspec.structs.replace(SELECTIVE, policy=policy)
    engine = engine_options(tiny["qwen2"], shield="seal", share=share, **forms)
    async with pair_of(engine) as pair:
        asked = [request(prompt, DRAWN, id=str(i)) for i, prompt in enumerate(PROMPTS)]
        got = await answers(pair.client, *asked)
        assert [tokens(chunks) for chunks in got] == [tokens(chunks) for chunks in wanted]
        await pair.quiet()
        assert pair.receives.installed_pages > 0
        assert not pair.faults()


async def test_a_prefix_that_the_decode_worker_holds_is_not_sent_again(
    tiny: dict[str, Path],
) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        first, second = PROMPTS[3], PROMPTS[3][:320] + prompt_of(130, 9)
        await answers(pair.client, request(first, SOME, id="first"))
        await pair.quiet()
        assert pair.receives.installed_pages == 7
        (outlet,) = pair.sends.outlets
        sent = outlet.stats.sent_pages_bytes
        page = sent // 7
        await answers(pair.client, request(second, SOME, id="second"))
        await pair.quiet()
        assert pair.receives.installed_pages == 7 + 2, "five of seven were there"
        assert outlet.stats.sent_pages_bytes - sent < 3 * page


async def test_pages_the_prefill_worker_held_already_are_sent_too(tiny: dict[str, Path]) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        await answers(pair.client, request(PROMPTS[3], SOME, id="first"))
        await pair.quiet()
        for manager in pair.decode.core.caches.managers.values():
            manager.evict_pages("a", 99)
        (again,) = await answers(pair.client, request(PROMPTS[3], SOME, id="again"))
        assert again[0].cached_tokens >= 448, "what the prefill worker found is told"
        assert pair.receives.installed_pages == 2 * 7
        await pair.quiet()


async def test_pages_pass_through_shared_memory_on_one_host(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    wanted = alone(tiny["qwen2"], SOME)
    link = msgspec.structs.replace(QUICK, listen=f"shm://{tmp_path}/link", window_bytes=1 << 20)
    async with pair_of(engine_options(tiny["qwen2"], shield="off"), link=link) as pair:
        asked = [request(prompt, SOME, id=str(i)) for i, prompt in enumerate(PROMPTS)]
        got = await answers(pair.client, *asked)
        assert [tokens(chunks) for chunks in got] == [tokens(chunks) for chunks in wanted]
        assert pair.receives.installed_pages == sum(len(prompt) // 64 for prompt in PROMPTS)
        assert [outlet.stats.name for outlet in pair.sends.outlets] == ["shared memory"]
        await pair.quiet()
        assert not pair.faults()


async def test_what_closes_faster_than_the_queue_takes_is_sent_later(
    tiny: dict[str, Path],
) -> None:
    wanted = alone(tiny["qwen2"], SOME)
    link = msgspec.structs.replace(QUICK, queue_bytes=1, window_bytes=1)
    async with pair_of(engine_options(tiny["qwen2"], shield="off"), link=link) as pair:
        asked = [request(prompt, SOME, id=str(i)) for i, prompt in enumerate(PROMPTS)]
        got = await answers(pair.client, *asked)
        assert [tokens(chunks) for chunks in got] == [tokens(chunks) for chunks in wanted]
        assert pair.receives.installed_pages == sum(len(prompt) // 64 for prompt in PROMPTS)
        await pair.quiet()
        assert not pair.faults()


async def test_short_and_branching_requests_stay_where_they_are_answered(
    tiny: dict[str, Path],
) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off"), least_tokens=300) as pair:
        two = SamplingParams(max_tokens=4, n=2, temperature=1.0, seed=1, ignore_eos=True)
        scored = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=1, ignore_eos=True)
        asked = [
            request(PROMPTS[1], SOME, id="short"),
            request(PROMPTS[2], two, id="two"),
            request(PROMPTS[2], scored, id="scored"),
            msgspec.structs.replace(request(PROMPTS[2], SOME, id="unstored"), store=False),
        ]
        got = await answers(pair.client, *asked)
        assert [chunks[-1].finish for chunks in got] == [FinishReason.LENGTH] * 4
        assert pair.prefill.core.stats().prompt_tokens_total == 0


class Nothing:
    """The answer of an engine without room for its prompt."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return Chunk(finish=FinishReason.LENGTH)

    async def aclose(self) -> None:
        """Nothing runs."""


def held_pages(pair: Pair) -> int:
    """Return the pages that somebody uses in the decode engine."""
    managers = pair.decode.core.caches.managers.values()
    uses = [use for manager in managers for use in manager.stats().accounts.values()]
    return sum(use.used_pages - use.unreferenced_pages for use in uses)


def ended(pair: Pair) -> dict[str, int]:
    """Return how the decode engine's requests have ended."""
    return dict(pair.decode.core.stats().finished)


@pytest.mark.parametrize("kv", ["bf16", "k2v2"])
@pytest.mark.parametrize("late", [False, True], ids=["there", "late"])
async def test_an_answer_of_one_token_is_the_prefill_engines_and_nothing_is_sent(
    tiny: dict[str, Path], kv: str, late: bool
) -> None:
    one = msgspec.structs.replace(DRAWN, max_tokens=1)
    wanted = alone(tiny["qwen2"], one, kv=kv)
    engine = engine_options(tiny["qwen2"], shield="off", kv=kv)
    async with pair_of(engine, patience_s=0.0 if late else 20.0) as pair:
        asked = [request(prompt, one, id=str(i)) for i, prompt in enumerate(PROMPTS)]
        got = await answers(pair.client, *asked)
        for chunks, alike in zip(got, wanted, strict=True):
            assert tokens(chunks) == tokens(alike)
            assert "".join(c.text for c in chunks) == "".join(c.text for c in alike)
            assert [p for c in chunks for p in c.logprobs] == [p for c in alike for p in c.logprobs]
            assert chunks[-1].finish is FinishReason.LENGTH
        await until(lambda: ended(pair)["length"] == len(PROMPTS))
        stats = pair.decode.core.stats()
        assert (stats.steps_total > 0) == late, "the other stands by"
        assert stats.generation_tokens_total == len(PROMPTS), "and counts"
        assert stats.ttft_s.counts[-1] == len(PROMPTS)
        assert not pair.sends.outlets


async def test_who_stands_by_holds_nobody_up(tiny: dict[str, Path]) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        step, go = pair.prefill.core.step, threading.Event()

        def held() -> list[Output]:
            """Take a step once it may."""
            go.wait(20.0)
            return step()

        pair.prefill.core.step = held  # type: ignore[method-assign]
        alike = [PROMPTS[3][:200] + prompt_of(60, number) for number in range(3)]
        ones = [request(prompt, ONE, id=f"one{i}") for i, prompt in enumerate(alike)]
        waiting = [asyncio.ensure_future(answer(pair.client.submit(one))) for one in ones]
        short = answers(pair.client, request(alike[0][:63], SOME, id="short"))
        (told,) = await asyncio.wait_for(short, 10.0)
        assert told[-1].finish is FinishReason.LENGTH
        assert not any(task.done() for task in waiting)
        assert not held_pages(pair), "and holds nothing"
        go.set()
        for chunks in await asyncio.gather(*waiting):
            assert chunks[-1].finish is FinishReason.LENGTH
        await pair.quiet()


async def test_who_stands_by_takes_no_pages_that_are_another_requests(
    tiny: dict[str, Path],
) -> None:
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        one = request(PROMPTS[3][:200] + prompt_of(60, 1), ONE, id="one")
        more = request(PROMPTS[3], SOME, id="more")
        got = await answers(pair.client, one, more)
        assert [len(tokens(chunks)) for chunks in got] == [1, 12]
        assert pair.receives.installed_pages == len(PROMPTS[3]) // 64
        await pair.quiet()


async def test_an_answer_needs_nothing_of_who_stands_by(tiny: dict[str, Path]) -> None:
    wanted = alone(tiny["qwen2"], ONE)
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        await pair.client._decode.set_tenants({"a": 0.001})  # it refuses the prompt
        (got,) = await answers(pair.client, request(PROMPTS[3], ONE))
        assert tokens(got) == tokens(wanted[3])
        (refused,) = await answers(pair.client, request(PROMPTS[3], SOME, id="more"))
        assert refused[-1].finish is FinishReason.ERROR
        await pair.quiet()


async def test_an_answer_without_a_token_is_computed_by_who_stands_by(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = alone(tiny["qwen2"], ONE)
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        monkeypatch.setattr(pair.client._prefill, "submit", lambda _: Nothing())
        (got,) = await answers(pair.client, request(PROMPTS[3], ONE))
        assert tokens(got) == tokens(wanted[3])


@pytest.mark.parametrize("counted", [False, True])
def test_what_another_engine_told_counts_once(tiny: dict[str, Path], counted: bool) -> None:
    core = core_for(tiny["qwen2"], threads=1)
    spec = request(PROMPTS[0], SOME, id="r")
    core.submit(msgspec.structs.replace(spec, handover=Handover(role="decode")))
    core.begin(m.Begin("r", (5, 6), counted=counted))
    while not core.idle():
        core.step()
    stats = core.stats()
    assert stats.generation_tokens_total == 10 + 2 * (not counted)
    assert stats.ttft_s.counts[-1] == (not counted)
    assert dict(stats.finished)["length"] == 1


@pytest.mark.parametrize("evict", ["off", "corm"])
async def test_what_is_shorter_than_a_coded_block_stays_where_no_rows_are_sent(
    tiny: dict[str, Path], evict: str
) -> None:
    engine = engine_options(tiny["qwen2"], shield="off", kv="k2v2", evict=evict)
    async with pair_of(engine, least_tokens=32) as pair:
        await answers(pair.client, request(prompt_of(63, 5), SOME, id="page"))
        assert pair.prefill.core.stats().prompt_tokens_total == 0
        await answers(pair.client, request(prompt_of(127, 5), SOME, id="short"))
        assert pair.prefill.core.stats().prompt_tokens_total == (127 if evict == "off" else 0)
        await answers(pair.client, request(prompt_of(128, 5), SOME, id="block"))
        assert pair.prefill.core.stats().prompt_tokens_total == (255 if evict == "off" else 128)


async def test_a_tenant_that_stores_nothing_is_sent_nothing(tiny: dict[str, Path]) -> None:
    wanted = alone(tiny["qwen2"], SOME)
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        terms = {"a": TenantTerms(voter="a", store="never")}
        await pair.client.set_tenants({"a": 0.9}, terms)
        (got,) = await answers(pair.client, request(PROMPTS[2], SOME))
        assert tokens(got) == tokens(wanted[2])
        assert pair.receives.installed_pages == 0
        await pair.quiet()


async def test_a_stop_in_the_first_token_ends_both(tiny: dict[str, Path]) -> None:
    wanted = alone(tiny["qwen2"], SOME)
    stop = SamplingParams(
        max_tokens=12, temperature=0.0, stop_token_ids=(tokens(wanted[3])[0],), ignore_eos=True
    )
    async with pair_of(engine_options(tiny["qwen2"], shield="off")) as pair:
        (got,) = await answers(pair.client, request(PROMPTS[3], stop))
        assert [chunk.finish for chunk in got] == [FinishReason.STOP]
        await pair.quiet()
        await until(lambda: ended(pair)["stop"] == 1)
        assert ended(pair)["cancelled"] == 0
