"""A real server process and the real `openai` client, on the demo model, with three tenants."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import signal
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import pytest
from openai import APIConnectionError, AsyncOpenAI, AuthenticationError, OpenAI

from kvkeep.cli import run
from kvkeep.config import DEMO_MODEL
from tests.servers import Server, serving

TENANTS: Final = {"harbour": 0.4, "library": 0.3, "market": 0.3}
PARALLEL: Final = 100
RIGHT: Final = 0.9
"""Share of held-out questions to be answered right; the model itself reaches 0.96 and more."""

Messages = list[Any]


class Question(NamedTuple):
    """A held-out conversation up to a question, and its answer."""

    messages: Messages
    answer: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--kv-cache-memory-bytes", "256MiB", "--threads", "2")
    with serving(tmp_path_factory.mktemp("server"), TENANTS, *options) as running:
        yield running


@pytest.fixture
def harbour(server: Server) -> Iterator[OpenAI]:
    with client(server, "harbour") as opened:
        yield opened


@pytest.fixture
def library(server: Server) -> Iterator[OpenAI]:
    with client(server, "library") as opened:
        yield opened


def client(server: Server, tenant: str) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=server.keys[tenant], max_retries=0)


def heldout() -> list[Question]:
    found = []
    for line in (DEMO_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        found += [
            Question(messages[:turn], message["content"])
            for turn, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    return found


def ask(opened: OpenAI, messages: Messages, tokens: int = 16) -> Any:
    return opened.chat.completions.create(
        model="demo", messages=messages, max_tokens=tokens, temperature=0.0
    )


def text_of(opened: OpenAI, prompt: str, **options: Any) -> str:
    reply = opened.completions.create(
        model="demo", prompt=prompt, temperature=0.0, max_tokens=24, **options
    )
    return str(reply.choices[0].text)


def facts(name: str, count: int = 40) -> str:
    """Return a text of several pages that nobody else has sent."""
    return " ".join(f"The access code of the {name} gate {i} is {1000 + i}." for i in range(count))


def test_the_model_is_listed(harbour: OpenAI) -> None:
    assert [model.id for model in harbour.models.list()] == ["demo"]
    assert harbour.models.retrieve("demo").id == "demo"


def test_torch_is_loaded_by_the_engine_alone(server: Server) -> None:
    with_torch = [p for p in server.tree() if "libtorch" in Path(f"/proc/{p}/maps").read_text()]
    assert with_torch
    assert server.process.pid not in with_torch


def test_no_key_is_an_authentication_error(server: Server) -> None:
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="kvk_none", max_retries=0) as stranger,
        pytest.raises(AuthenticationError),
    ):
        stranger.models.list()


def test_a_chat_stream_is_the_whole_answer_in_parts_with_usage(harbour: OpenAI) -> None:
    messages = heldout()[0].messages
    whole = ask(harbour, messages)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        harbour.chat.completions.create(
            model="demo",
            messages=messages,
            max_tokens=16,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    parts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(parts) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    last = chunks[-1]
    assert not last.choices
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_beams_and_the_best_of_several(harbour: OpenAI) -> None:
    """Over the wire and the process boundary: ranked, counted, the prompt found again."""
    prompt = facts("sunken", 12)
    greedy = text_of(harbour, prompt)
    beams = harbour.completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=24,
        n=2,
        logprobs=0,
        extra_body={"use_beam_search": True, "best_of": 4, "length_penalty": 0.0},
    )
    scores = [sum(choice.logprobs.token_logprobs) for choice in beams.choices]  # type: ignore[union-attr, arg-type]
    assert scores == sorted(scores, reverse=True)
    assert beams.usage is not None
    assert beams.usage.completion_tokens > 2 * 24
    one = harbour.completions.create(
        model="demo", prompt=prompt, max_tokens=24, extra_body={"use_beam_search": True}
    )
    assert one.choices[0].text == greedy
    best = harbour.completions.create(
        model="demo", prompt=prompt, max_tokens=8, n=1, best_of=3, seed=1
    )
    assert best.usage is not None
    assert best.usage.completion_tokens > 8
    assert best.usage.prompt_tokens_details is not None
    assert best.usage.prompt_tokens_details.cached_tokens == best.usage.prompt_tokens


def test_a_completion_stream_is_the_whole_text_in_parts(harbour: OpenAI) -> None:
    chunks = list(
        harbour.completions.create(
            model="demo", prompt="The north gate", max_tokens=24, temperature=0.0, stream=True
        )
    )
    assert len(chunks) > 8
    assert "".join(c.choices[0].text for c in chunks) == text_of(harbour, "The north gate")


def test_n_is_two_answers_that_a_seed_repeats(harbour: OpenAI) -> None:
    def two() -> list[str]:
        reply = harbour.completions.create(
            model="demo", prompt="The file is", max_tokens=24, n=2, seed=5, temperature=1.0
        )
        assert [choice.index for choice in reply.choices] == [0, 1]
        return [choice.text for choice in reply.choices]

    first = two()
    assert first[0] != first[1]
    assert two() == first


def test_logprobs_of_a_chat(harbour: OpenAI) -> None:
    reply = harbour.chat.completions.create(
        model="demo",
        messages=heldout()[0].messages,
        max_tokens=8,
        temperature=0.0,
        logprobs=True,
        top_logprobs=3,
    )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content
    assert content
    for token in content:
        chances = [math.exp(top.logprob) for top in token.top_logprobs]
        assert len(chances) == 3
        assert sorted(chances, reverse=True) == chances
        assert sum(chances) <= 1 + 1e-6
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == token.top_logprobs[0].logprob
    assert content[-1].token == "<|end|>"
    assert "".join(token.token for token in content[:-1]) == reply.choices[0].message.content


def test_echo_gives_the_prompt_its_logprobs(harbour: OpenAI) -> None:
    prompt = "The access code of the north gate is 4821. The access code of the north gate is 4821"
    reply = harbour.completions.create(
        model="demo", prompt=prompt, max_tokens=1, temperature=0.0, echo=True, logprobs=1
    )
    found: Any = reply.choices[0].logprobs
    assert reply.choices[0].text == "".join(found.tokens)
    assert reply.choices[0].text.startswith(prompt)
    assert found.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in found.token_logprobs[1:])
    repeated = found.token_logprobs[-4:-1]
    assert min(repeated) > math.log(0.5), "the code was just told"


def test_a_stop_string_ends_an_answer_and_is_never_shown(harbour: OpenAI) -> None:
    whole = text_of(harbour, "Return the")
    stop = whole[9:13]
    assert stop
    expected = whole[: whole.index(stop)]
    assert text_of(harbour, "Return the", stop=[stop]) == expected
    chunks = list(
        harbour.completions.create(
            model="demo",
            prompt="Return the",
            max_tokens=24,
            temperature=0.0,
            stop=stop,
            stream=True,
        )
    )
    assert "".join(c.choices[0].text for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_tenant_finds_its_own_prompt_and_nobody_elses(harbour: OpenAI, library: OpenAI) -> None:
    def cached(opened: OpenAI) -> int:
        usage = ask(opened, [{"role": "user", "content": facts("own")}], tokens=1).usage
        assert usage.prompt_tokens > 200
        return int(usage.prompt_tokens_details.cached_tokens)

    assert cached(harbour) == 0
    assert cached(harbour) > 200
    assert cached(library) == 0, "another tenant's equal prompt was found"
    assert cached(library) > 200


def test_held_out_questions_are_answered_right(harbour: OpenAI) -> None:
    questions = heldout()
    answers = [ask(harbour, question.messages).choices[0].message.content for question in questions]
    right = sum(a == question.answer for a, question in zip(answers, questions, strict=True))
    assert len(questions) >= 90
    assert right >= RIGHT * len(questions), f"{right} of {len(questions)}"


async def test_a_hundred_at_once_are_answered_as_if_alone(server: Server) -> None:
    prompts = [question.messages for question in heldout()[:40:4]]
    requests = [(tenant, i % 10) for i, tenant in zip(range(PARALLEL), cycle(TENANTS))]
    clients = {
        tenant: AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        for tenant, key in server.keys.items()
    }

    async def answer(tenant: str, prompt: int) -> str:
        reply = await clients[tenant].chat.completions.create(
            model="demo", messages=prompts[prompt], max_tokens=12, temperature=0.0
        )
        return str(reply.choices[0].message.content)

    try:
        alone = [await answer("harbour", prompt) for prompt in range(10)]
        together = await asyncio.gather(*(answer(*request) for request in requests))
    finally:
        for opened in clients.values():
            await opened.close()
    assert len(set(alone)) > 5
    assert together == [alone[prompt] for _, prompt in requests]


def test_the_admin_port_tells_its_operator(server: Server) -> None:
    assert server.admin("/metrics", token="another").status_code == 401
    ready = server.ready()
    assert (ready.status, ready.accounts, ready.in_flight) == ("ok", len(TENANTS), 0)
    assert (ready.engine.requests_running, ready.engine.requests_waiting) == (0, 0)
    assert dict(ready.engine.finished)["error"] == 0
    page = server.admin("/metrics").text
    for name in ("prefix_cache_hits_total", "generation_tokens_total", "engine_up"):
        sample = re.search(rf"^kvkeep:{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
        assert sample, name
        assert float(sample[1]) > 0, name


def test_sigterm_lets_the_running_end_and_exits_with_zero(
    server: Server, harbour: OpenAI, library: OpenAI
) -> None:
    """Ends the module's server, so it comes last of those that need it."""
    stream = harbour.completions.create(
        model="demo",
        prompt="Return the",
        max_tokens=400,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 200
    assert server.process.wait(30) == 0
    with pytest.raises(APIConnectionError):
        ask(library, [{"role": "user", "content": "Hello"}])
    with pytest.raises(httpx.ConnectError):
        server.admin("/ready")
    log = server.log.read_text(encoding="utf-8")
    assert "Traceback" not in log
    assert "access code" not in log


def without_a_tensor(model: Path) -> None:
    file = model / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + size])
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    begin, _ = header.pop(last)["data_offsets"]
    told = json.dumps(header).encode()
    file.write_bytes(len(told).to_bytes(8, "little") + told + raw[8 + size : 8 + size + begin])


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def without_a_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def of_another_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without_a_tensor, "lacks tensor"),
        (truncated, "truncated"),
        (without_a_tokenizer, "tokenizer"),
        (of_another_architecture, "`architectures`"),
    ],
)
def test_a_model_that_cant_be_served_is_one_sentence(
    damage: Any, named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    damage(model)
    ports = ["--port", "0", "--admin-port", "0"]
    assert run(["serve", "--no-auth", "--model", str(model), *ports]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    sentence = said.strip().splitlines()[-1]
    assert sentence.startswith("kvkeep: ")
    assert named in sentence
