"""Every endpoint through OpenAI's own client, against a server on a real port."""

from __future__ import annotations

import asyncio

import pytest
from openai import AsyncOpenAI, NotFoundError
from openai.types.chat import ChatCompletionMessageParam

from kvkeep.server.options import ServerOptions
from tests.server.conftest import Running, Start
from tests.server.fakes import BOS, MAX_LEN, MODEL, REPLY, FakeEngine

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def openai_client(server: Running) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=20)


async def test_models_are_listed_and_found(start: Start) -> None:
    async with start() as server, openai_client(server) as client:
        models = await client.models.list()
        assert [m.id for m in models.data] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(NotFoundError):
            await client.models.retrieve("other")


async def test_chat_answers_with_usage_and_cached_tokens(start: Start) -> None:
    async with start(FakeEngine(cached_tokens=7)) as server, openai_client(server) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=HI)
        assert reply.object == "chat.completion"
        assert reply.choices[0].message.content == REPLY
        assert reply.choices[0].message.role == "assistant"
        assert reply.choices[0].finish_reason == "stop"
        prompt = server.engine.requests[0].prompt_ids
        assert bytes(prompt[1:]).decode() == "<user>hi\n<assistant>"
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(prompt)
        assert reply.usage.completion_tokens == len(REPLY.encode())
        assert reply.usage.total_tokens == len(prompt) + len(REPLY.encode())
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 7


async def test_chat_roles_parts_and_empty_history_fields_reach_the_template(start: Start) -> None:
    async with start() as server, server.client() as http:
        messages = [
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {
                "role": "assistant",
                "content": "c",
                "refusal": None,
                "tool_calls": None,
                "annotations": [],
            },
            {"role": "user", "content": "d", "name": "someone"},
        ]
        answer = await http.post(
            "/v1/chat/completions", json={"model": MODEL, "messages": messages}
        )
        assert answer.status_code == 200
        prompt = bytes(server.engine.requests[0].prompt_ids[1:]).decode()
        assert prompt == "<system>be brief\n<user>ab\n<assistant>c\n<user>d\n<assistant>"


async def test_chat_stream_is_the_answer_with_usage_at_its_end(start: Start) -> None:
    async with start() as server, openai_client(server) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=HI,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(REPLY.encode())
        assert all(c.usage is None for c in chunks[:-1])
        assert len({c.id for c in chunks}) == 1


async def test_usage_can_come_with_every_event(start: Start) -> None:
    async with start() as server, openai_client(server) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=HI,
            stream=True,
            extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        )
        counts = [c.usage.completion_tokens async for c in stream if c.usage]
        assert counts == sorted(counts)
        assert counts[0] == 1


async def test_n_sequences_with_logprobs(start: Start) -> None:
    async with start() as server, openai_client(server) as client:
        reply = await client.chat.completions.create(
            model=MODEL,
            messages=HI,
            n=3,
            logprobs=True,
            top_logprobs=2,
        )
        assert [c.index for c in reply.choices] == [0, 1, 2]
        assert {c.message.content for c in reply.choices} == {REPLY}
        logprobs = reply.choices[2].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert logprobs.content[0].token == "H"
        assert logprobs.content[0].bytes == [ord("H")]
        assert [t.token for t in logprobs.content[0].top_logprobs] == ["H", "H+1"]
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 3 * len(REPLY.encode())


async def test_sampling_fields_reach_the_engine(start: Start) -> None:
    async with start() as server, openai_client(server) as client:
        await client.chat.completions.create(
            model=MODEL,
            messages=HI,
            max_completion_tokens=9,
            temperature=0.3,
            top_p=0.8,
            seed=5,
            stop=["x", "yy"],
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={"65": -100},
            extra_body={
                "top_k": 4,
                "min_p": 0.1,
                "min_tokens": 2,
                "ignore_eos": True,
                "repetition_penalty": 1.2,
                "stop_token_ids": [7],
                "include_stop_str_in_output": True,
                "skip_special_tokens": False,
            },
        )
        p = server.engine.requests[0].params
        assert (p.max_tokens, p.temperature, p.top_p, p.seed) == (9, 0.3, 0.8, 5)
        assert (p.stop, p.stop_token_ids, p.logit_bias) == (("x", "yy"), (7,), ((65, -100.0),))
        assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.5, -0.5, 1.2)
        assert (p.top_k, p.min_p, p.min_tokens) == (4, 0.1, 2)
        assert (p.ignore_eos, p.include_stop, p.skip_special_tokens) == (True, True, False)


async def test_defaults_fill_the_context_for_chats_and_16_tokens_for_completions(
    start: Start,
) -> None:
    async with start() as server, openai_client(server) as client:
        await client.chat.completions.create(model=MODEL, messages=HI)
        await client.completions.create(model=MODEL, prompt="hi")
        chat, completion = server.engine.requests
        assert chat.params.max_tokens == MAX_LEN - len(chat.prompt_ids)
        assert completion.params.max_tokens == 16
        assert chat.params.logprobs is None


async def test_beams_and_the_best_of_several_are_asked_of_the_engine(start: Start) -> None:
    """What was generated and not returned is counted too."""
    async with start(FakeEngine(unsent_tokens=40)) as server, openai_client(server) as client:
        best = await client.completions.create(
            model=MODEL, prompt="x", n=2, best_of=5, max_tokens=4, echo=True
        )
        assert best.usage is not None
        assert best.usage.completion_tokens == 2 * 4 + 40
        assert [c.text for c in best.choices] == ["x" + REPLY[:4]] * 2
        beams = {"use_beam_search": True, "length_penalty": 0.5, "temperature": 0, "best_of": 4}
        answer = await client.chat.completions.create(
            model=MODEL, messages=HI, n=3, extra_body=beams
        )
        assert len(answer.choices) == 3
        first, second = (request.params for request in server.engine.requests)
        assert (first.n, first.best_of, first.use_beam_search) == (2, 5, False)
        assert (second.n, second.best_of, second.use_beam_search) == (3, 4, True)
        assert second.length_penalty == 0.5


async def test_as_many_as_are_returned_may_be_streamed(start: Start) -> None:
    async with start() as server, openai_client(server) as client:
        stream = await client.completions.create(
            model=MODEL, prompt="x", n=2, best_of=2, max_tokens=3, stream=True
        )
        assert {choice.index async for event in stream for choice in event.choices} == {0, 1}


async def test_completions_of_a_batch_of_texts_and_of_token_ids(start: Start) -> None:
    async with start() as server, openai_client(server) as client:
        reply = await client.completions.create(
            model=MODEL, prompt=["one", "three"], n=2, max_tokens=5
        )
        assert [c.index for c in reply.choices] == [0, 1, 2, 3]
        assert {c.text for c in reply.choices} == {"Hello"}
        assert {c.finish_reason for c in reply.choices} == {"length"}
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len("one") + len("three") + 2
        assert reply.usage.completion_tokens == 4 * 5
        one, three = server.engine.requests
        assert (one.prompt_ids, three.prompt_ids[1:]) == ((BOS, *b"one"), tuple(b"three"))
        assert one.id != three.id
        await client.completions.create(model=MODEL, prompt=[1, 2, 3])
        await client.completions.create(model=MODEL, prompt=[[4, 5], [6]])
        assert [r.prompt_ids for r in server.engine.requests[2:]] == [(1, 2, 3), (4, 5), (6,)]


async def test_echo_with_logprobs_scores_the_prompt(start: Start) -> None:
    """What a harness needs to score continuations: one entry per prompt token, the first null."""
    async with start() as server, openai_client(server) as client:
        reply = await client.completions.create(
            model=MODEL,
            prompt=[[65, 66, 67], [BOS, 68]],
            echo=True,
            max_tokens=1,
            logprobs=1,
            temperature=0,
        )
        first, second = reply.choices
        assert (first.text, second.text) == ("ABCH", "DH")
        assert first.logprobs is not None
        assert first.logprobs.tokens == ["A", "B", "C", "H"]
        scores: list[float | None] = [*(first.logprobs.token_logprobs or [])]
        assert scores == [None, -0.5, -0.5, -0.5]
        assert first.logprobs.text_offset == [0, 1, 2, 3]
        assert first.logprobs.top_logprobs is not None
        assert first.logprobs.top_logprobs[1:] == [{"B": -0.5}, {"C": -0.5}, {"H": -0.5}]
        assert second.logprobs is not None
        assert second.logprobs.tokens == ["<bos>", "D", "H"]


async def test_echo_without_new_tokens_is_the_prompt_alone(start: Start) -> None:
    async with start() as server, openai_client(server) as client:
        reply = await client.completions.create(
            model=MODEL, prompt="AB", echo=True, max_tokens=0, logprobs=0
        )
        assert reply.choices[0].text == "AB"
        assert reply.choices[0].logprobs is not None
        assert reply.choices[0].logprobs.tokens == ["<bos>", "A", "B"]
        assert reply.choices[0].finish_reason == "length"


async def test_completion_stream_echoes_first(start: Start) -> None:
    async with start() as server, openai_client(server) as client:
        stream = await client.completions.create(
            model=MODEL, prompt="AB", echo=True, max_tokens=5, n=2, stream=True
        )
        texts = {0: "", 1: ""}
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == {0: "ABHello", 1: "ABHello"}


async def test_tokenize_and_back(start: Start) -> None:
    async with start() as server, server.client() as http:
        tokens = (await http.post("/tokenize", json={"prompt": "hö"})).json()
        assert tokens == {"count": 4, "max_model_len": MAX_LEN, "tokens": [BOS, 104, 195, 182]}
        bare = await http.post("/tokenize", json={"prompt": "h", "add_special_tokens": False})
        assert bare.json()["tokens"] == [104]
        chat = await http.post("/tokenize", json={"messages": HI, "add_generation_prompt": False})
        assert bytes(chat.json()["tokens"][1:]) == b"<user>hi\n"
        text = await http.post("/detokenize", json={"tokens": tokens["tokens"]})
        assert text.json() == {"prompt": "hö"}


async def test_a_hundred_clients_at_a_time_get_their_own_answers(start: Start) -> None:
    async with start(FakeEngine(delay_s=0.005)) as server, openai_client(server) as client:

        async def ask(i: int) -> str | None:
            if i % 2:
                reply = await client.completions.create(
                    model=MODEL, prompt=f"{i}", echo=True, max_tokens=13
                )
                return reply.choices[0].text
            stream = await client.completions.create(
                model=MODEL, prompt=f"{i}", echo=True, max_tokens=13, stream=True
            )
            return "".join([c.choices[0].text async for c in stream])

        answers = await asyncio.gather(*(ask(i) for i in range(100)))
        assert answers == [f"{i}{REPLY[:12]}" for i in range(100)]
        assert server.engine.live == set()


async def test_a_tenants_length_is_what_fits_its_reserved_share(start: Start) -> None:
    async with start() as server:
        key = server.file.add("small", share=0.02)
        async with server.admin() as admin:
            assert (await admin.post("/reload")).status_code == 200
        async with server.client(key.text) as http:
            body = {"model": MODEL, "prompt": [65] * 100, "max_tokens": 29}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "max_tokens"
            answer = await http.post("/v1/completions", json={**body, "max_tokens": 28})
            assert answer.status_code == 200
            chat = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": HI})
            assert chat.status_code == 200
            request = server.engine.requests[-1]
            assert request.params.max_tokens == 2 * 64 - len(request.prompt_ids)


async def test_cosmetic_fields_are_ignored_and_counted(start: Start) -> None:
    async with start() as server, server.client() as http, server.admin() as admin:
        body = {"model": MODEL, "messages": HI, "user": "u", "metadata": {"a": "b"}, "store": True}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        page = (await admin.get("/metrics")).text
        for name in ("user", "metadata", "store"):
            assert f'kvkeep:ignored_fields_total{{field="{name}"}} 1.0' in page


@pytest.mark.parametrize("shared", [False, True])
async def test_scopes_are_a_tenants_own_or_its_salts_alone(start: Start, *, shared: bool) -> None:
    options = ServerOptions(share_by_salt=shared)
    async with start(options=options) as server:
        for key in (server.key, server.gateway_key):
            for salt in ({}, {"X-Cache-Salt": "blue"}):
                async with server.client(key) as client:
                    body = {"model": MODEL, "prompt": "hi"}
                    answer = await client.post("/v1/completions", json=body, headers=salt)
                    assert answer.status_code == 200
        scopes = [request.scope for request in server.engine.requests]
    assert len(set(scopes)) == (2 if shared else 4)
    assert (scopes[:2] == scopes[2:]) is shared


async def test_what_must_not_be_stored_is_told_to_the_engine(start: Start) -> None:
    async with start() as server, server.client() as client:
        body = {"model": MODEL, "prompt": "hi"}
        for headers in ({}, {"X-Kvkeep-Store": "never"}):
            await client.post("/v1/completions", json=body, headers=headers)
        refused = await client.post("/v1/completions", json=body, headers={"X-Kvkeep-Store": "no"})
        assert [request.store for request in server.engine.requests] == [True, False]
    assert refused.json()["error"]["param"] == "X-Kvkeep-Store"
