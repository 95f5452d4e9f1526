"""What the server needs of a tokenizer and a chat template, and the bounded workers they run in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


ChatMessage = Mapping[str, str]
"""One message as chat templates read it: `role` and `content`."""


class TextModel(Protocol):
    """A tokenizer and its chat template; called from worker threads."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""

    def apply_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool
    ) -> list[int]:
        """Return a rendered chat's token ids; `InvalidRequest` where the template refuses it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""

    def token_text(self, token_id: int) -> str:
        """Return one token's own text, special tokens included."""


class TextWorkers:
    """Runs functions in a few threads, one at a time per account: none waits for another's pile."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvkeep-text")
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}

    async def run(self, account: str, function: Callable[[], T]) -> T:
        """Return the function's result once it is the account's turn."""
        lock, waiting = self._turns.get(account, (asyncio.Lock(), 0))
        self._turns[account] = (lock, waiting + 1)
        try:
            async with lock:
                return await asyncio.get_running_loop().run_in_executor(self._pool, function)
        finally:
            lock, waiting = self._turns[account]
            if waiting == 1:
                del self._turns[account]
            else:
                self._turns[account] = (lock, waiting - 1)

    def close(self) -> None:
        """Let the threads end once their current work is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)
