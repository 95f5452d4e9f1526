"""OpenVINO GenAI's continuous batching pipeline in process: its packages bring no server.

The default is fp16 weights and what the library chooses itself: bfloat16 arithmetic where the
machine has it, an 8-bit key-value cache. `--option int8` measures 8-bit weights, `--option u8kv`
names the 8-bit cache instead of relying on the default, `--option f32kv` keeps keys and values in
32 bits, `--option f32` is arithmetic in 32 bits.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

from tools.peers.protocol import Arguments, Loaded, Measured, serve, window


class OpenVinoPeer:
    """The pipeline, stepped by hand."""

    def __init__(self, pipeline: openvino_genai.ContinuousBatchingPipeline) -> None:
        self._pipeline = pipeline
        self._next_id = 0

    def prefill(self, prompt: Sequence[int]) -> Measured:
        """Measure from submission to the first token."""
        begin = time.perf_counter()
        arrivals = self._run([prompt], 1)
        return Measured(len(prompt), arrivals[0][0] - begin)

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
        """Measure the tokens that come while all sequences are being decoded."""
        return window(self._run(prompts, tokens))

    def close(self) -> None:
        """Nothing outlives the process."""

    def _run(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[float]]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        handles = []
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], np.int64))
            handles.append(self._pipeline.add_request(self._next_id, ids, config))
            self._next_id += 1
        arrivals: list[list[float]] = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for handle, times in zip(handles, arrivals, strict=True):
                while handle.can_read():
                    (output,) = handle.read().values()
                    times.extend([now] * len(output.generated_ids))
        if any(len(times) != tokens for times in arrivals):
            raise RuntimeError(f"{[len(t) for t in arrivals]} tokens came, {tokens} were asked for")
        return arrivals


def exported(model: Path, weights: str) -> Path:
    """Return the model in OpenVINO's format, converted on first use."""
    out = model.parent / f"{model.name}-openvino-{weights}"
    if not out.is_dir():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        command = [
            str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino",
            "--model", str(model), "--task", "text-generation-with-past",
            "--weight-format", weights, str(part),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
        part.rename(out)
    return out


def load(arguments: Arguments) -> Loaded:
    """Convert where needed and load."""
    weights = "int8" if arguments.option == "int8" else "fp16"
    path = exported(arguments.model, weights)
    properties: dict[str, object] = {
        "INFERENCE_NUM_THREADS": arguments.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    if arguments.option in ("u8kv", "f32kv"):
        properties["KV_CACHE_PRECISION"] = arguments.option.removesuffix("kv")
    if arguments.option == "f32":
        properties["INFERENCE_PRECISION_HINT"] = "f32"
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 4
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(path), scheduler, "CPU", properties, {}, {}
    )
    peer = OpenVinoPeer(pipeline)
    config = json.loads((arguments.model / "config.json").read_text())
    settings = {"weights": weights, **properties}
    version = importlib.metadata.version("openvino-genai")
    return Loaded("openvino", version, settings, peer, config["vocab_size"])


if __name__ == "__main__":
    serve(load)
