"""From the bytes of a body to requests for the engine: everything that runs in a text worker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from msgspec import UNSET

from kvkeep.engine.api import GenerateRequest, ModelInfo, SamplingParams
from kvkeep.errors import InvalidRequest
from kvkeep.server.body import parse_object
from kvkeep.server.chat import ChatAnswer, ChatEvents
from kvkeep.server.completions import CompletionAnswer, CompletionEvents, CompletionShape, Echo
from kvkeep.server.identity import Identity, check_salt, derive_scope
from kvkeep.server.options import ServerOptions
from kvkeep.server.replies import Head, Tally, Text, Tokens
from kvkeep.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingFields,
    TokenizeRequest,
)
from kvkeep.server.streaming import Answer, Events, UsageMode
from kvkeep.server.text import ChatMessage, TextModel
from kvkeep.server.validation import (
    Wanted,
    check_chars,
    check_ids,
    check_messages,
    check_model,
    check_prompt,
    decode,
    sampling_params,
)

_COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a request is prepared with."""

    id: str
    identity: Identity
    scope_key: bytes
    text: TextModel
    info: ModelInfo
    names: tuple[str, ...]
    options: ServerOptions


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to run, and how its answer is written."""

    requests: tuple[GenerateRequest, ...]
    stream: bool
    answer: Answer
    events: Events
    tally: Tally
    ignored: tuple[str, ...]


def prepare_chat(context: Context, raw: bytes) -> Prepared:
    """Return a chat request, rendered and tokenised."""
    limits = context.options.limits
    decoded = decode(parse_object(raw, limits), ChatRequest)
    request = decoded.request
    check_model(request.model, context.names)
    if request.response_format is not None and request.response_format.type != "text":
        raise InvalidRequest("only type text is served", param="response_format")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("needs logprobs = true", param="top_logprobs")
    messages = check_messages(request.messages, limits)
    _check_before_text(context, request)
    ids = context.text.apply_chat(messages, add_generation_prompt=True)
    check_prompt(ids, "messages", context.info)
    field, max_tokens = _chat_max_tokens(request)
    wanted = Wanted(
        prompt_tokens=len(ids),
        max_tokens=max_tokens,
        default_max_tokens=None,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        max_tokens_field=field,
    )
    params = sampling_params(request, wanted, context.info, limits)
    head = Head(f"chatcmpl-{context.id}", int(time.time()), request.model)
    logprobs = params.logprobs is not None
    return Prepared(
        requests=_requests(context, request, [ids], [params], _system(context, messages, ids)),
        stream=bool(request.stream),
        answer=ChatAnswer(head, params.n, logprobs),
        events=ChatEvents(head, logprobs, UsageMode.of(request.stream_options)),
        tally=Tally(len(ids)),
        ignored=decoded.ignored,
    )


def prepare_completion(context: Context, raw: bytes) -> Prepared:
    """Return a completion request, tokenised: one prompt or a batch of them."""
    limits = context.options.limits
    decoded = decode(parse_object(raw, limits), CompletionRequest)
    request = decoded.request
    check_model(request.model, context.names)
    n, prompt_only = request.n or 1, bool(request.echo and request.max_tokens == 0)
    _check_before_text(context, request)
    batch = _batch(context, request)
    prompts = [_prompt_ids(context, prompt) for prompt in batch]
    if len(prompts) * (request.best_of or n) > limits.max_sequences:
        raise InvalidRequest(
            f"prompts times it must be at most {limits.max_sequences}",
            param="n" if request.best_of is None else "best_of",
        )
    params = [
        sampling_params(
            request,
            Wanted(
                prompt_tokens=len(ids),
                max_tokens=1 if prompt_only else request.max_tokens,
                default_max_tokens=_COMPLETION_MAX_TOKENS,
                logprobs=request.logprobs,
                prompt_logprobs=request.logprobs if request.echo else None,
            ),
            context.info,
            limits,
        )
        for ids in prompts
    ]
    head = Head(f"cmpl-{context.id}", int(time.time()), request.model)
    shape = CompletionShape(
        n=n,
        logprobs=request.logprobs is not None,
        echoes=tuple(map(partial(_echo, context), batch, prompts)) if request.echo else (),
        prompt_only=prompt_only,
    )
    return Prepared(
        requests=_requests(context, request, prompts, params),
        stream=bool(request.stream),
        answer=CompletionAnswer(head, shape, len(prompts)),
        events=CompletionEvents(head, shape, UsageMode.of(request.stream_options)),
        tally=Tally(sum(map(len, prompts))),
        ignored=decoded.ignored,
    )


def prepare_tokenize(context: Context, raw: bytes) -> Tokens:
    """Return the token ids of a prompt or of a rendered chat."""
    limits = context.options.limits
    request = decode(parse_object(raw, limits), TokenizeRequest).request
    check_model(request.model, context.names)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("send either prompt or messages", param="prompt")
    if request.messages is not None:
        messages = check_messages(request.messages, limits)
        ids = context.text.apply_chat(
            messages, add_generation_prompt=request.add_generation_prompt is not False
        )
    else:
        prompt = request.prompt or ""
        check_chars(len(prompt), "prompt", limits)
        ids = context.text.encode(
            prompt, add_special_tokens=request.add_special_tokens is not False
        )
    return Tokens(count=len(ids), max_model_len=context.info.max_model_len, tokens=ids)


def prepare_detokenize(context: Context, raw: bytes) -> Text:
    """Return the text of token ids."""
    limits = context.options.limits
    request = decode(parse_object(raw, limits), DetokenizeRequest).request
    check_model(request.model, context.names)
    check_ids(request.tokens, context.info.vocab_size, "tokens")
    return Text(prompt=context.text.decode(request.tokens))


def _check_before_text(context: Context, request: SamplingFields) -> None:
    """Refuse what can be refused without knowing the prompt's tokens."""
    if request.cache_salt is not UNSET:
        check_salt(request.cache_salt, "cache_salt")
    room = Wanted(prompt_tokens=1, max_tokens=None, default_max_tokens=None, logprobs=None)
    unbounded = context.info.max_model_len
    if (request.min_tokens or 0) >= unbounded:
        raise InvalidRequest(f"must be below {unbounded}", param="min_tokens")
    sampling_params(request, room, context.info, context.options.limits)


def _chat_max_tokens(request: ChatRequest) -> tuple[str, int | None]:
    new, old = request.max_completion_tokens, request.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequest(
            "contradicts max_completion_tokens; send one of them", param="max_tokens"
        )
    return ("max_completion_tokens", new) if new is not None else ("max_tokens", old)


def _batch(context: Context, request: CompletionRequest) -> list[str] | list[list[int]]:
    """Return the prompts: a text, a list of texts, one list of ids, or a list of such lists."""
    prompt, limits = request.prompt, context.options.limits
    if isinstance(prompt, str):
        prompt = [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    ids = [item for item in prompt if isinstance(item, int)]
    if len(prompt) not in (len(texts), len(lists), len(ids)):
        raise InvalidRequest("must not mix texts, token ids and lists of token ids", param="prompt")
    count = len(prompt) if not ids else 1
    if not 0 < count <= limits.max_prompts:
        raise InvalidRequest(f"must hold 1 to {limits.max_prompts} prompts", param="prompt")
    check_chars(sum(map(len, texts)), "prompt", limits)
    return texts or lists or [ids]


def _prompt_ids(context: Context, prompt: str | list[int]) -> list[int]:
    ids = (
        context.text.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
    )
    check_prompt(ids, "prompt", context.info)
    check_ids(ids, context.info.vocab_size, "prompt")
    return ids


def _system(
    context: Context, messages: Sequence[ChatMessage], ids: list[int]
) -> tuple[tuple[int, int], ...]:
    """Return the span of a chat's system prompt where tokens are evicted: it stays."""
    if context.info.evict == "off" or messages[0]["role"] != "system":
        return ()
    try:
        alone = context.text.apply_chat(messages[:1], add_generation_prompt=False)
    except InvalidRequest:
        return ()
    same = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), len(alone))
    return ((0, same),) if same else ()


def _echo(context: Context, prompt: str | list[int], ids: list[int]) -> Echo:
    text = prompt if isinstance(prompt, str) else context.text.decode(ids)
    return Echo(text, context.text.token_text(ids[0]))


def _requests(
    context: Context,
    request: SamplingFields,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    protected: tuple[tuple[int, int], ...] = (),
) -> tuple[GenerateRequest, ...]:
    identity = context.identity
    body_salt = None if request.cache_salt is UNSET else request.cache_salt
    salts = [salt for salt in (identity.salt, body_salt) if salt is not None]
    if context.options.share_by_salt:
        scope = derive_scope(context.scope_key, "", None, salts)
    else:
        scope = derive_scope(context.scope_key, identity.account, identity.subject, salts)
    return tuple(
        GenerateRequest(
            id=context.id if len(prompts) == 1 else f"{context.id}-{i}",
            tenant=identity.account,
            scope=scope,
            prompt_ids=tuple(ids),
            params=param,
            deadline_s=context.options.deadline_s,
            store=identity.store,
            evict=identity.evict,
            protected=protected,
        )
        for i, (ids, param) in enumerate(zip(prompts, params, strict=True))
    )
