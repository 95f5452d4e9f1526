"""Fit the costs of steps that `kvkeep simulate` takes to what `kvkeep bench step_costs` measured.

Usage: python -m tools.fit_costs bench/results/step_costs-MACHINE.json > costs.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from kvkeep.sim.costs import Chunk, CodecCosts, Costs, Step, fit_prefill, fit_steps

PLAIN: Final = "bf16"
"""The form of pages that needs no encoding."""


def fitted(document: Mapping[str, Any]) -> Costs:
    """Return the costs that fit a result's rows."""
    rows = document["rows"]
    codecs = {row["kv"]: row for row in rows if row.get("part") == "codec"}
    chunks = {name: _chunks(rows, name) for name in codecs}
    prefill = fit_prefill(chunks[PLAIN])
    steps = fit_steps({name: _steps(rows, name) for name in codecs})
    plain = codecs[PLAIN]["bytes_per_token"]
    meta = document["meta"]
    costs = Costs(
        source=(
            f"{meta['params']['model']}'s shapes, {meta['params']['threads']} threads, "
            f"{meta['machine']['cpu']}, {meta['date'][:10]}, commit {meta['commit'][:8]}"
        ),
        bytes_per_token=plain,
        chunk_s=prefill.chunk_s,
        prefill_s_per_token=prefill.token_s,
        prefill_s_per_token_pair=prefill.pair_s,
        step_s=steps.step_s,
        row_s=steps.row_s,
        codecs={},
    )
    found = {
        name: CodecCosts(
            bytes_per_token=row["bytes_per_token"],
            context_s_per_token=steps.context_s[name],
            encode_s_per_token=0.0 if name == PLAIN else _encode_s(costs, chunks[name]),
            window_tokens=row["window_tokens"],
        )
        for name, row in codecs.items()
    }
    return msgspec.structs.replace(costs, codecs=found)


def _encode_s(costs: Costs, chunks: Sequence[Chunk]) -> float:
    """Return what a token of these chunks takes beyond one of 16-bit pages, by all of them."""
    beyond = sum(c.took_s - costs.chunk_time_s(c.tokens, c.context) for c in chunks)
    return max(0.0, beyond / sum(c.tokens for c in chunks))


def _chunks(rows: Sequence[Mapping[str, Any]], kv: str) -> list[Chunk]:
    return [
        Chunk(row["tokens"], row["context"], row["seconds"])
        for row in rows
        if row.get("part") == "chunk" and row["kv"] == kv
    ]


def _steps(rows: Sequence[Mapping[str, Any]], kv: str) -> list[Step]:
    return [
        Step(row["rows"], row["context"], row["seconds"])
        for row in rows
        if row.get("part") == "step" and row["kv"] == kv
    ]


def main(arguments: Sequence[str]) -> int:
    """Print the fitted costs of the one result file that is named."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    costs = fitted(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(costs)) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
