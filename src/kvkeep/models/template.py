"""Chat templates: finding and rendering them in transformers' sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from kvkeep.errors import CheckpointError, InvalidRequest
from kvkeep.models.checkpoint import Json, read_json

DEFAULT_NAME = "default"
TOOLS_NAME = "tool_use"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A checkpoint's template, and the one it has for tools where they differ."""

    source: str
    tools_source: str

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Json] | None,
        named: Json,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        """Return the conversation's text; raises `InvalidRequest` where the template refuses it."""
        source = self.source if tools is None else self.tools_source
        try:
            rendered = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=None if tools is None else list(tools),
                chat_template=source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **named,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as err:
            raise InvalidRequest(_refusal(err, source), param="messages") from err
        text: str = rendered[0][0]
        return text


def find_template(path: Path) -> ChatTemplate | None:
    """Return the directory's template, from chat_template.jinja, .json or tokenizer_config.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        source = file.read_text(encoding="utf-8")
        return ChatTemplate(source, source)
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path / name).is_file():
            found = read_json(path / name).get("chat_template")
            if found is not None:
                return _from_field(found, path / name)
    return None


def special_tokens(path: Path) -> Json:
    """Return the special tokens a template may name, as the tokenizer's config spells them."""
    named: Json = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = read_json(path / name) if (path / name).is_file() else {}
        for key in NAMED_TOKENS:
            value = fields.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named.setdefault(key, text)
    return named


def _from_field(value: object, file: Path) -> ChatTemplate:
    if isinstance(value, str):
        return ChatTemplate(value, value)
    try:
        by_name = {entry["name"]: entry["template"] for entry in value}  # type: ignore[attr-defined]
        source = by_name[DEFAULT_NAME]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{file} has a malformed `chat_template`") from error
    return ChatTemplate(source, by_name.get(TOOLS_NAME, source))


def _refusal(error: Exception, source: str) -> str:
    """Quote the reason only where it stands in the template: content is never repeated."""
    reason = str(error)
    said = f": {reason}" if reason and reason in source else ""
    return f"the model's chat template refuses these messages{said}"
