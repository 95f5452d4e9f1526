"""From a parsed body to a checked request: a refusal names the field, never its value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from kvkeep.engine.api import ModelInfo, SamplingParams
from kvkeep.engine.fanout import check_fanout
from kvkeep.errors import InvalidRequest
from kvkeep.server.body import JsonObject, printable
from kvkeep.server.options import ServerLimits
from kvkeep.server.problems import NotFound
from kvkeep.server.schemas import (
    COSMETIC_FIELDS,
    COSMETIC_MESSAGE_FIELDS,
    UNSUPPORTED_FIELDS,
    UNSUPPORTED_MESSAGE_FIELDS,
    ContentPart,
    Message,
    SamplingFields,
)
from kvkeep.server.text import ChatMessage

S = TypeVar("S", bound=msgspec.Struct)

_PATH = re.compile(r"(?P<text>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Decoded(Generic[S]):
    """A request of the right types, and the names of the fields that were ignored."""

    request: S
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the two endpoints express differently about the same request."""

    prompt_tokens: int
    max_tokens: int | None
    default_max_tokens: int | None
    """None: as many as fit."""
    logprobs: int | None
    prompt_logprobs: int | None = None
    max_tokens_field: str = "max_tokens"


def decode(body: JsonObject, kind: type[S]) -> Decoded[S]:
    """Return `body` as a request; refuses unknown, unsupported and mistyped fields."""
    known = frozenset(kind.__struct_fields__)
    kept, ignored = _sift(body, known, COSMETIC_FIELDS, UNSUPPORTED_FIELDS, "")
    if isinstance(messages := kept.get("messages"), list):
        sifted = [_sift_message(m, i) for i, m in enumerate(messages)]
        kept["messages"] = [fields for fields, _ in sifted]
        ignored = tuple(dict.fromkeys((*ignored, *(name for _, names in sifted for name in names))))
    try:
        return Decoded(msgspec.convert(kept, kind), ignored)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None


def check_model(asked: str | None, names: Sequence[str]) -> None:
    """Raise 404 where the model asked for is not served."""
    if asked is not None and asked not in names:
        raise NotFound("this server has no such model; see /v1/models", param="model")


def check_messages(messages: Sequence[Message], limits: ServerLimits) -> list[ChatMessage]:
    """Return the messages as templates read them."""
    if len(messages) > limits.max_messages:
        raise InvalidRequest(f"must have at most {limits.max_messages} messages", param="messages")
    result: list[ChatMessage] = []
    size = 0
    for i, message in enumerate(messages):
        role = _ROLES.get(message.role)
        if role is None:
            raise InvalidRequest(
                "must be system, developer, user or assistant (tools are not served)",
                param=f"messages[{i}].role",
            )
        content = _content(message.content, f"messages[{i}].content")
        size += len(content)
        result.append({"role": role, "content": content})
    check_chars(size, "messages", limits)
    return result


def check_chars(size: int, param: str, limits: ServerLimits) -> None:
    """Raise where a prompt is too long to be worth tokenising."""
    if size > limits.max_prompt_chars:
        raise InvalidRequest(f"must be at most {limits.max_prompt_chars} characters", param=param)


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise where an id is outside the vocabulary."""
    if ids and max(ids) >= vocab_size:
        raise InvalidRequest(f"token ids must be below {vocab_size}", param=param)


def check_prompt(ids: Sequence[int], param: str, info: ModelInfo) -> None:
    """Raise where a prompt is empty or leaves no room for a token."""
    if not ids:
        raise InvalidRequest("must hold at least one token", param=param)
    if len(ids) >= info.max_model_len:
        raise InvalidRequest(
            f"has {len(ids)} tokens; prompt and answer may have {info.max_model_len}",
            param=param,
        )


def sampling_params(
    request: SamplingFields, wanted: Wanted, info: ModelInfo, limits: ServerLimits
) -> SamplingParams:
    """Return the engine's parameters, all ranges checked."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("is only for streams: send stream = true", param="stream_options")
    n = request.n or 1
    for name, count in (("n", n), ("best_of", request.best_of or n)):
        if count > limits.max_n:
            raise InvalidRequest(f"must be at most {limits.max_n}", param=name)
    max_tokens = _max_tokens(wanted, info)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest("must not be above max_tokens", param="min_tokens")
    if wanted.logprobs is not None and wanted.logprobs > limits.max_logprobs:
        raise InvalidRequest(
            f"must ask for at most {limits.max_logprobs} alternatives", param="logprobs"
        )
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(0, request.top_k or 0),
        min_p=_or(request.min_p, 0.0),
        seed=request.seed,
        n=n,
        best_of=request.best_of,
        use_beam_search=bool(request.use_beam_search),
        length_penalty=_or(request.length_penalty, 1.0),
        stop=_stops(request.stop, limits),
        stop_token_ids=_stop_ids(request.stop_token_ids, info, limits),
        ignore_eos=bool(request.ignore_eos),
        include_stop=bool(request.include_stop_str_in_output),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        logit_bias=_logit_bias(request.logit_bias, info, limits),
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        skip_special_tokens=request.skip_special_tokens is not False,
    )
    check_fanout(params)
    if request.stream and params.ranks:
        raise InvalidRequest(
            "can't be streamed: the best are known at the end; send stream = false",
            param="use_beam_search" if params.use_beam_search else "best_of",
        )
    return params


def _sift(
    fields: JsonObject,
    known: frozenset[str],
    cosmetic: frozenset[str],
    unsupported: dict[str, tuple[Any, ...]],
    prefix: str,
) -> tuple[JsonObject, tuple[str, ...]]:
    """Split off the fields without effect; refuse those that would have one."""
    kept: JsonObject = {}
    ignored: list[str] = []
    for name, value in fields.items():
        if name in known:
            kept[name] = value
        elif name in cosmetic:
            ignored.append(name)
        elif name not in unsupported:
            raise InvalidRequest("no such field; leave it out", param=f"{prefix}{printable(name)}")
        elif value is not None and value not in unsupported[name]:
            raise InvalidRequest(
                "is not supported by this server; leave it out", param=f"{prefix}{name}"
            )
    return kept, tuple(ignored)


def _sift_message(message: Any, index: int) -> tuple[Any, tuple[str, ...]]:
    if not isinstance(message, dict):
        return message, ()
    return _sift(
        message,
        frozenset(Message.__struct_fields__),
        COSMETIC_MESSAGE_FIELDS,
        UNSUPPORTED_MESSAGE_FIELDS,
        f"messages[{index}].",
    )


def _refusal(message: str) -> InvalidRequest:
    """Return msgspec's complaint with its path as the field's name, and without values."""
    match = _PATH.fullmatch(message)
    text, path = (match["text"], match["path"]) if match else (message, None)
    field = (path or "").lstrip(".")
    if text.startswith("Object missing required field"):
        missing = text.split("`")[1]
        return InvalidRequest("is required", param=f"{field}.{missing}" if field else missing)
    if text.startswith("Object contains unknown field"):
        extra = printable(text.split("`", 1)[1].rstrip("`"))
        return InvalidRequest(
            "no such field; leave it out", param=f"{field}.{extra}" if field else extra
        )
    if text.startswith("Invalid"):
        text = "is not one of the accepted values"
    return InvalidRequest(text[0].lower() + text[1:], param=field or "body")


def _content(content: str | list[ContentPart] | None, param: str) -> str:
    if content is None:
        raise InvalidRequest("is required: a string or a list of text parts", param=param)
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if part.type != "text":
            raise InvalidRequest("only parts of type text are served", param=f"{param}[{i}].type")
        if part.text is None:
            raise InvalidRequest("is required", param=f"{param}[{i}].text")
    return "".join(part.text or "" for part in content)


def _max_tokens(wanted: Wanted, info: ModelInfo) -> int:
    room = info.max_model_len - wanted.prompt_tokens
    if wanted.max_tokens is None:
        return room if wanted.default_max_tokens is None else min(room, wanted.default_max_tokens)
    if wanted.max_tokens < 1:
        raise InvalidRequest("must be at least 1", param=wanted.max_tokens_field)
    if wanted.max_tokens > room:
        raise InvalidRequest(
            f"must be at most {room}: {info.max_model_len} less the prompt's tokens",
            param=wanted.max_tokens_field,
        )
    return wanted.max_tokens


def _stops(stop: str | list[str] | None, limits: ServerLimits) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > limits.max_stops:
        raise InvalidRequest(f"must have at most {limits.max_stops} strings", param="stop")
    if any(not 0 < len(s) <= limits.max_stop_chars for s in stops):
        raise InvalidRequest(
            f"each string must have 1 to {limits.max_stop_chars} characters", param="stop"
        )
    return stops


def _stop_ids(ids: list[int] | None, info: ModelInfo, limits: ServerLimits) -> tuple[int, ...]:
    if ids is None:
        return ()
    if len(ids) > limits.max_stop_token_ids:
        raise InvalidRequest(
            f"must have at most {limits.max_stop_token_ids} ids", param="stop_token_ids"
        )
    check_ids(ids, info.vocab_size, "stop_token_ids")
    return tuple(ids)


def _logit_bias(
    bias: dict[str, float] | None, info: ModelInfo, limits: ServerLimits
) -> tuple[tuple[int, float], ...]:
    if bias is None:
        return ()
    if len(bias) > limits.max_logit_bias:
        raise InvalidRequest(
            f"must have at most {limits.max_logit_bias} entries", param="logit_bias"
        )
    if any(not (key.isascii() and key.isdigit() and len(key) <= 10) for key in bias):
        raise InvalidRequest("its keys must be token ids", param="logit_bias")
    pairs = {int(key): value for key, value in bias.items()}
    if len(pairs) != len(bias):
        raise InvalidRequest("must not name a token twice", param="logit_bias")
    check_ids(list(pairs), info.vocab_size, "logit_bias")
    return tuple(sorted(pairs.items()))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
