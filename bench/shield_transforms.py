"""What exact transforms cost: whole decoding steps, and the published method's two phases."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import numpy as np
import torch

from bench import harness
from bench.harness import Figure, Goal, Options, Row
from bench.ours import TENANT, Ours, greedy
from kvkeep import ops
from kvkeep.engine.batch_kv import Techniques
from kvkeep.engine.build import Parts
from kvkeep.eviction.policy import KeepAll
from kvkeep.models import make
from kvkeep.ops.layout import Heads, Ops
from kvkeep.quant.codec import Float
from kvkeep.sharing.policy import ShareNothing
from kvkeep.shield.policy import NoShield, Shield
from kvkeep.shield.transform import LinearShield, TransformName

LIKE: Final = "qwen2.5-0.5b"
KEY: Final = bytes(range(32))
CONTEXT: Final = 1024
BATCHES: Final = (1, 8)
STEPS: Final = 120
GOALS: Final[dict[TransformName, Goal | None]] = {
    "perm": Goal("<=", 0.02),
    "orth": Goal("<=", 0.06),
    "mask": None,
}


class Published(NamedTuple):
    """A model of the published method, of which keys and values alone matter."""

    name: str
    layers: int
    heads: Heads
    hidden: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the bytes of a token's keys and values in float32, as published."""
        return self.layers * self.heads.num_kv_heads * self.heads.head_dim * 2 * 4


PUBLISHED: Final = (
    Published("LLaMA2-7B", 32, Heads(32, 32, 128), 4096),
    Published("ChatGLM3-6B", 28, Heads(32, 2, 128), 4096),
    Published("Qwen2-7B", 28, Heads(28, 4, 128), 3584),
)


def figures(options: Options) -> tuple[list[Figure], list[Row]]:
    """Measure decoding with and without transforms, then the cost of a published model's token."""
    found, rows = decode(options)
    kernels = ops.select("auto", options.threads)
    return found, [*rows, *(published(one, kernels, options) for one in PUBLISHED)]


def decode(options: Options) -> tuple[list[Figure], list[Row]]:
    """Take steps of four engines in turn; of both batches the worse is a mode's overhead."""
    rows: list[Row] = []
    worst: dict[TransformName, harness.Estimate] = {}
    with TemporaryDirectory() as folder:
        layers = 6 if options.quick else None
        model = make.make(LIKE, Path(folder) / LIKE, seed=0, layers=layers)
        shields: list[Shield] = [NoShield(), *(LinearShield(mode, KEY) for mode in GOALS)]
        sides = [side_of(model, shield, options.threads) for shield in shields]
        for batch in BATCHES:
            took = steps_of(sides, batch, 20 if options.quick else STEPS)
            for mode, own in zip(GOALS, took[1:], strict=True):
                over = harness.estimate((own / took[0] - 1).tolist())
                rows.append(
                    {
                        "mode": mode,
                        "model": LIKE,
                        "requests": batch,
                        "context_tokens": CONTEXT,
                        "plain_ms": 1e3 * float(np.median(took[0])),
                        "shielded_ms": 1e3 * float(np.median(own)),
                        "overhead": over.median,
                    }
                )
                if mode not in worst or over.median > worst[mode].median:
                    worst[mode] = over
        del sides
        gc.collect()
    found = [Figure(f"{mode}_decode_overhead", worst[mode], goal) for mode, goal in GOALS.items()]
    return found, rows


def side_of(model: Path, shield: Shield, threads: int) -> Ours:
    """Return a warm engine behind a shield."""
    techniques = Techniques(Float(), shield, KeepAll())
    parts = Parts(techniques=techniques, policy=ShareNothing())
    return Ours(model, threads=threads, kv_cache_bytes=512 << 20, parts=parts)


def steps_of(
    sides: list[Ours],
    batch: int,
    steps: int,
    context: int = CONTEXT,
    begins: Callable[[int], None] = lambda _: None,
) -> list[np.ndarray]:
    """Return the seconds of decoding steps of each side, which take turns.

    `begins` hears whose turn it is.
    """
    for side in sides:
        core = side.core
        core.set_tenants({})
        core.set_tenants({TENANT: 1.0})
        for _ in range(batch):
            side.submit(side.prompt(context), greedy(4 * steps))
        fresh = 0
        while fresh < batch:
            before = core.counters.generated_tokens
            core.step()
            fresh = core.counters.generated_tokens - before
    took: list[list[float]] = [[] for _ in sides]
    order = list(range(len(sides)))
    for _ in range(steps):
        for at in order:
            begins(at)
            begun = time.perf_counter()
            sides[at].core.step()
            took[at].append(time.perf_counter() - begun)
        order = order[1:] + order[:1]
    return [np.array(seconds) for seconds in took]


def published(model: Published, kernels: Ops, options: Options) -> Row:
    """Return what a token costs under the published method, folded and not, and under `orth`.

    Sizes are those of float32, as published. Both ways shuffle keys and queries; without folds
    values are shuffled too and attention's output is put back: the run-time phase.
    """
    heads, layers = model.heads, model.layers
    q = torch.randn(1, heads.num_q_heads, heads.head_dim)
    k, v = (torch.randn(1, heads.num_kv_heads, heads.head_dim) for _ in range(2))
    row: dict[str, harness.Cell] = {
        "published_model": model.name,
        "kv_bytes_per_token": model.kv_bytes_per_token,
    }
    for name, mode, fold in (
        ("perm", "perm", True),
        ("perm_unfolded", "perm", False),
        ("orth", "orth", True),
    ):
        work = LinearShield(mode, KEY, fold=fold).on(heads, kernels)  # type: ignore[arg-type]

        def token() -> None:
            for layer in range(layers):
                work.transform(k, "k", layer)  # noqa: B023 - called in this turn alone
                work.transform(v, "v", layer)  # noqa: B023
                work.transform(q, "q", layer)  # noqa: B023
                work.restore(q, layer)  # noqa: B023

        row[f"{name}_us_per_token"] = 1e6 * least(token, 3 if options.quick else 30)
    weight = torch.randn(heads.num_kv_heads * heads.head_dim, model.hidden)
    out = torch.randn(model.hidden, heads.num_q_heads * heads.head_dim)
    (fold_values,) = LinearShield("perm", KEY).folds(heads)

    def one_layer() -> None:
        fold_values.apply("model.layers.0.self_attn.v_proj.weight", weight)
        fold_values.apply("model.layers.0.self_attn.o_proj.weight", out)

    row["folds_ms"] = 1e3 * layers * least(one_layer, 1 if options.quick else 3)
    return row


def least(call: Callable[[], None], turns: int) -> float:
    """Return the least seconds of some calls, after one that prepares."""
    call()
    found = []
    for _ in range(turns):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)
