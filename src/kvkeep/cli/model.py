"""`kvkeep model`: make random checkpoints for speed work, describe any checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvkeep.cli.console import NOTES, OUT, human_bytes, make_table
from kvkeep.cli.options import new_app
from kvkeep.config import DEMO_MODEL
from kvkeep.errors import ConfigError

app = new_app("Make or describe a checkpoint.")


@app.command()
def make(
    out: Annotated[Path, typer.Argument(help="new directory")],
    like: Annotated[str, typer.Option(help="shapes of this model, such as qwen2.5-0.5b")],
    random: Annotated[bool, typer.Option("--random", help="random weights")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    layers: Annotated[int | None, typer.Option(help="fewer layers than the model has")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option()] = "bfloat16",
) -> None:
    """Write a checkpoint with a known model's shapes."""
    from kvkeep.models import make as maker

    if not random:
        raise ConfigError("random: only random weights can be made; add --random")
    path = maker.make(like, out, seed=seed, layers=layers, dtype=dtype)
    NOTES.print(f"Wrote {path}")


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="checkpoint directory")] = str(DEMO_MODEL),
) -> None:
    """Describe a checkpoint, or say why it can't be served."""
    from kvkeep.models.check import check_config
    from kvkeep.models.checkpoint import DTYPE_BYTES, open_checkpoint

    checkpoint = open_checkpoint(Path(path))
    config = checkpoint.config
    family = check_config(config)
    tensors = checkpoint.tensors.values()
    layers, query_heads = config["num_hidden_layers"], config["num_attention_heads"]
    heads = config.get("num_key_value_heads") or query_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // query_heads
    per_token = 2 * layers * heads * head_dim
    rows = [
        ("family", family),
        ("parameters", f"{sum(math.prod(t.shape) for t in tensors):,}"),
        (
            "weights",
            human_bytes(sum(math.prod(t.shape) * DTYPE_BYTES[t.dtype] for t in tensors)),
        ),
        ("stored dtypes", ", ".join(sorted({t.dtype for t in tensors}))),
        ("layers", layers),
        ("attention heads", f"{query_heads} query, {heads} KV"),
        ("head_dim", head_dim),
        ("vocabulary", f"{config['vocab_size']:,}"),
        ("context", f"{config['max_position_embeddings']:,} tokens"),
        ("KV bytes per token", f"{2 * per_token} in bfloat16, {4 * per_token} in float32"),
    ]
    OUT.print(make_table(("field", "value"), rows, title=path))
