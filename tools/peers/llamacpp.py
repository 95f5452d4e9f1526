"""llama.cpp through its C API in process: bf16 weights, its own batching, greedy choice by argmax.

`--option q8_0` measures 8-bit weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from tools.peers.protocol import Arguments, Loaded, Measured, serve

BATCH = 2048
FAMILIES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


class LlamaCppPeer:
    """A context with room for eight sequences."""

    def __init__(self, path: Path, vocab: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if self._model is None:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = 8 * 2048, 8
        params.n_batch, params.n_ubatch = BATCH, 512
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._vocab = vocab

    def prefill(self, prompt: Sequence[int]) -> Measured:
        """Measure from the first call to the first token."""
        self._clear()
        begin = time.perf_counter()
        self._begin(0, prompt)
        return Measured(len(prompt), time.perf_counter() - begin)

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
        """Measure the steps after the first token of all sequences."""
        self._clear()
        latest = [self._begin(i, prompt) for i, prompt in enumerate(prompts)]
        begin = time.perf_counter()
        for step in range(tokens - 1):
            rows = [(token, len(prompts[i]) + step, i, True) for i, token in enumerate(latest)]
            latest = self._decode(rows)
        return Measured(len(prompts) * (tokens - 1), time.perf_counter() - begin)

    def close(self) -> None:
        """Free the native objects."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _begin(self, sequence: int, prompt: Sequence[int]) -> int:
        last = len(prompt) - 1
        rows = [(token, i, sequence, i == last) for i, token in enumerate(prompt)]
        return self._decode(rows)[0]

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Run rows of (token, position, sequence, wanted); return the wanted ones' next tokens."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        return [self._best(i) for i, row in enumerate(rows) if row[3]]

    def _best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


def converted(model: Path, weights: str) -> Path:
    """Return the checkpoint in llama.cpp's format without a tokenizer, written on first use."""
    out = model.parent / f"{model.name}-{weights}.gguf"
    if out.is_file():
        return out
    config = json.loads((model / "config.json").read_text())
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise RuntimeError(f"{config['model_type']} is not one of {', '.join(FAMILIES)}")
    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[family])
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(family, config["num_hidden_layers"])
    for name, values in _tensors(model):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise RuntimeError(f"no place for tensor {name}")
        _add(writer, found, values, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(out)
    return out


def _tensors(model: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name).float().numpy()


def _add(writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], weights: str) -> None:
    kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType[weights]
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def load(arguments: Arguments) -> Loaded:
    """Convert where needed and load."""
    weights = "Q8_0" if arguments.option == "q8_0" else "BF16"
    vocab = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    peer = LlamaCppPeer(converted(arguments.model, weights), vocab, arguments.threads)
    version = importlib.metadata.version("llama-cpp-python")
    return Loaded("llamacpp", version, {"weights": weights}, peer, vocab)


if __name__ == "__main__":
    serve(load)
