"""transformers' own `generate`, in process, bf16 with its default attention and cache.

`--option static` compiles it over a static cache, `--option compile` over the default one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import transformers

from tools.peers.protocol import Arguments, Loaded, Measured, serve


class _StepClock:
    """A stopping criterion that stops nothing and notes the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class TransformersPeer:
    """A loaded model."""

    def __init__(self, model: transformers.PreTrainedModel, cache: str | None) -> None:
        self._model = model
        self._cache = cache

    def prefill(self, prompt: Sequence[int]) -> Measured:
        """Measure from the call to the first token."""
        begin = time.perf_counter()
        return Measured(len(prompt), self._steps([prompt], 1)[0] - begin)

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
        """Measure the steps after the first; prompts have one length, so nothing is padded."""
        times = self._steps(prompts, tokens)
        return Measured(len(prompts) * (len(times) - 1), times[-1] - times[0])

    def close(self) -> None:
        """Nothing outlives the process."""

    def _steps(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[float]:
        clock = _StepClock()
        ids = torch.tensor(prompts)
        extra = {} if self._cache is None else {"cache_implementation": self._cache}
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
                **extra,
            )
        if len(clock.times) != tokens:
            raise RuntimeError(f"{len(clock.times)} steps ran, {tokens} were asked for")
        return clock.times


def load(arguments: Arguments) -> Loaded:
    """Load."""
    torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16, local_files_only=True
    )
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if arguments.option == "compile":
        model.forward = torch.compile(model.forward, dynamic=True)
    peer = TransformersPeer(model, "static" if arguments.option == "static" else None)
    settings: dict[str, object] = {
        "dtype": "bfloat16",
        "attention": model.config._attn_implementation,  # noqa: SLF001 - no public name for it
        "variant": arguments.option or "default",
    }
    return Loaded("transformers", transformers.__version__, settings, peer, model.config.vocab_size)


if __name__ == "__main__":
    serve(load)
