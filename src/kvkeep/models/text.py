"""Text to token ids and back: the tokenizer, the chat template and incremental decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kvkeep.errors import CheckpointError, InvalidRequest
from kvkeep.models.checkpoint import Json
from kvkeep.models.template import ChatTemplate, find_template, special_tokens

REPLACEMENT = "\ufffd"
MAX_HELD = 3
"""Bytes an unfinished UTF-8 character can have."""
CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first decoded one may depend on."""
MAX_WINDOW = 32
"""Tokens decoded again at most, where output never becomes valid text."""
OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "spiece.model", "vocab.json", "vocab.txt")

Message = Mapping[str, Any]


class TextModel:
    """A checkpoint's tokenizer and chat template; safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, named: Json) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._named = named
        self._token_text = lru_cache(maxsize=65_536)(self._decode_one)

    @classmethod
    def load(cls, path: Path) -> TextModel:
        """Read a checkpoint directory; raises `CheckpointError` without a tokenizer.json."""
        file = path / "tokenizer.json"
        if not file.is_file():
            other = [name for name in OTHER_TOKENIZERS if (path / name).is_file()]
            found = f"; {other[0]} alone is not supported" if other else ""
            raise CheckpointError(f"{path} has no tokenizer.json{found}")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{file} is not a valid tokenizer: {error}") from error
        named = special_tokens(path)
        return cls(tokenizer, find_template(path), named)

    @property
    def vocab_size(self) -> int:
        """Return the number of ids that decode to something, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        """Return the id that starts a text, where the tokenizer names one."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Return the id that ends a text, where the tokenizer names one."""
        return self._id_of("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return token ids; raises `InvalidRequest` for text with lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("the text holds a lone surrogate, which is not Unicode") from error
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of all ids at once."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Return one token's own text, special tokens included; '' for ids the tokenizer lacks."""
        return self._token_text(token_id)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Json] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Return the template's text; raises `InvalidRequest` where it refuses or there is none."""
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        return self._template.render(
            messages,
            tools=tools,
            named=self._named,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def apply_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Json] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the rendered conversation's ids; the template writes special tokens itself."""
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self.encode(text, add_special_tokens=False)

    def stream(
        self, *, skip_special_tokens: bool = True, after: Sequence[int] = ()
    ) -> DecodeStream:
        """Return an incremental decoder for the tokens that follow `after` (the prompt)."""
        return DecodeStream(self._tokenizer, skip_special_tokens=skip_special_tokens, after=after)

    def _decode_one(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def _id_of(self, name: str) -> int | None:
        token = self._named.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)


class DecodeStream:
    """Decodes one sequence token by token, never handing out part of a character.

    A token's text may depend on those before (leading spaces, bytes of one character), so each step
    decodes a short window that starts anew after each clean end. Decoders write U+FFFD for bytes
    that are no character yet: those at the end are held back, all of them while they may still be
    one character, then the last few.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, after: Sequence[int] = ()
    ) -> None:
        self._decode = tokenizer.decode
        self._skip = skip_special_tokens
        self._window = list(after)
        self._clean = 0
        """Tokens of the window up to its last clean end."""
        self._sent = 0
        """Characters of the window's text already handed out."""
        self._restart(keep=len(self._window) - CONTEXT_TOKENS)

    def step(self, token_id: int) -> str:
        """Return the text that became complete with this token, possibly ''."""
        self._window.append(token_id)
        text = self._text()
        held = len(text) - len(text.rstrip(REPLACEMENT))
        if len(self._window) - self._clean > MAX_HELD:
            held = min(held, MAX_HELD)
        new = text[self._sent : len(text) - held]
        self._sent += len(new)
        if not held:
            self._restart(keep=self._clean if new else 0)
        elif len(self._window) > MAX_WINDOW:
            self._restart(keep=len(self._window) - MAX_HELD)
        return new

    def finish(self) -> str:
        """Return what is left at the end; bytes that never became a character are dropped."""
        new = self._text()[self._sent :].rstrip(REPLACEMENT)
        self._sent += len(new)
        return new

    def _text(self) -> str:
        text: str = self._decode(self._window, skip_special_tokens=self._skip)
        return text

    def _restart(self, keep: int) -> None:
        """Drop the window's first `keep` tokens: the rest is context for the next one."""
        self._window = self._window[max(keep, len(self._window) - MAX_WINDOW, 0) :]
        self._clean = len(self._window)
        text = self._text()
        self._sent = len(text) - min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_HELD)
