"""Measure a server through the OpenAI completions API, streaming, one light thread per sequence.

Runs in every peer's environment: standard library only.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence

from tools.peers.protocol import Measured, window


class CompletionsPeer:
    """A server on 127.0.0.1 that takes token-id prompts; greedy, never ending early."""

    def __init__(self, port: int, model: str, api_key: str = "none") -> None:
        self._port = port
        self._model = model
        self._headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {api_key}",
        }

    def prefill(self, prompt: Sequence[int]) -> Measured:
        """Measure from submission to the first token."""
        begin = time.perf_counter()
        arrivals = self._stream(prompt, 1)
        return Measured(len(prompt), arrivals[0] - begin)

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> Measured:
        """Measure the tokens that arrive while all sequences are being decoded."""
        arrivals: list[list[float]] = [[] for _ in prompts]

        def run(index: int) -> None:
            arrivals[index] = self._stream(prompts[index], tokens)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not all(arrivals):
            raise RuntimeError("a stream failed, see above")
        return window(arrivals)

    def close(self) -> None:
        """Nothing is held between requests."""

    def _stream(self, prompt: Sequence[int], tokens: int) -> list[float]:
        """Return when each token arrived; of several in one event, all get its time."""
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        arrivals: list[float] = []
        events = 0
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read(400)!r}")
            for line in response:
                now = time.perf_counter()
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                events += bool(event["choices"])
                usage = event.get("usage") or {}
                count = usage.get("completion_tokens", events)
                arrivals += [now] * (count - len(arrivals))
        finally:
            connection.close()
        if len(arrivals) != tokens:
            raise RuntimeError(f"{len(arrivals)} tokens came, {tokens} were asked for")
        return arrivals
