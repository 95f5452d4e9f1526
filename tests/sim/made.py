"""Made-up costs of steps, in round numbers."""

from __future__ import annotations

from kvkeep.sim.costs import CodecCosts, Costs

COSTS = Costs(
    source="made up",
    bytes_per_token=1000.0,
    chunk_s=0.005,
    prefill_s_per_token=0.001,
    prefill_s_per_token_pair=1e-7,
    step_s=0.02,
    row_s=0.001,
    codecs={
        "bf16": CodecCosts(bytes_per_token=1000.0, context_s_per_token=1e-6),
        "k2v2": CodecCosts(
            bytes_per_token=160.0,
            context_s_per_token=4e-7,
            encode_s_per_token=1e-5,
            window_tokens=128,
        ),
    },
    handover_s=0.004,
)
