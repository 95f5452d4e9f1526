"""transformers' own `generate`, given the same care: bf16, its fastest attention here."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Baseline:
    """A transformers model in this process."""

    def __init__(self, model: Path, *, threads: int) -> None:
        self._threads = threads
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._generator = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def seconds(self, batch: int, context: int, tokens: int) -> float:
        """Return the seconds of one `generate` call that makes exactly `tokens` tokens a row."""
        ids = torch.randint(1, 50_000, (batch, context), generator=self._generator)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        begun = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        elapsed = time.perf_counter() - begun
        torch.set_num_threads(before)
        return elapsed

    def decode_rate(self, batch: int, tokens: int, context: int = 32) -> float:
        """Return generated tokens per second, the prefill (one call of one token) taken off."""
        prefill = self.seconds(batch, context, 1)
        return batch * tokens / (self.seconds(batch, context, tokens + 1) - prefill)

    def prefill_rate(self, tokens: int) -> float:
        """Return prompt tokens per second until the first generated token."""
        return tokens / self.seconds(1, tokens, 1)
