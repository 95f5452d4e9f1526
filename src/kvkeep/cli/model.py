"""`kvkeep model`: make random checkpoints, seal or describe any, measure the bits keys need."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvkeep.cli.console import NOTES, OUT, counting_bar, human_bytes, make_table
from kvkeep.cli.engine import checkpoint_path, engine_options, key_options
from kvkeep.cli.files import read_text
from kvkeep.cli.options import new_app, with_settings
from kvkeep.config import DEMO_MODEL, Settings
from kvkeep.errors import ConfigError

app = new_app("Make, seal, describe or calibrate a checkpoint.")


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
@with_settings("keys", "shield_store", "shield_keys")
def seal(
    settings: Settings,
    model: Annotated[Path, typer.Argument(help="checkpoint directory")],
    *,
    out: Annotated[Path, typer.Option(help="new directory")],
) -> None:
    """Write a checkpoint whose weights open under a provider's key alone, at load.

    Config and tokenizer stay readable; they can't be changed unnoticed.
    """
    from kvkeep.engine.sealers import seal_model
    from kvkeep.shield.providers.provider import CAVEATS
    from kvkeep.shield.secret import forbid_dumps

    forbid_dumps()
    body = seal_model(key_options(settings), model, out)
    NOTES.print(f"Wrote {out}: {len(body.sealed)} sealed files, by a key of {body.provider}.")
    if body.provider in CAVEATS:
        NOTES.print(f"Note: {CAVEATS[body.provider]}.")
    NOTES.print(f"Serve it with --model {out} --shield-keys ...; {model} is still in the clear.")


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


@app.command()
@with_settings("config", "allow_download", "dtype", "weights", "kernel", "threads")
def calibrate(
    settings: Settings,
    model: Annotated[str, typer.Argument(help="checkpoint directory")],
    text: Annotated[
        list[Path] | None, typer.Option(help="text to measure on; its own if none")
    ] = None,
    budget_bits: Annotated[float | None, typer.Option(help="mean bits of keys, 2 to 4 (3)")] = None,
    quality: Annotated[float | None, typer.Option(help="largest divergence, in nats")] = None,
    evict: Annotated[
        bool, typer.Option("--evict", help="measure heads for --evict corm instead")
    ] = False,
    most_lost: Annotated[
        float | None, typer.Option(help="with --evict: weight a head may lose (0.02)")
    ] = None,
) -> None:
    """Measure which KV heads need four bits for keys, and write `--kv calibrated`'s file.

    With `--evict`: which window and weight each head needs, for `--evict corm`.
    """
    if evict:
        if budget_bits is not None or quality is not None:
            given = "quality" if budget_bits is None else "budget_bits"
            raise ConfigError(f"{given}: eviction has no bits to choose; leave it or --evict out")
        _calibrate_eviction(settings.model_copy(update={"model": model}), text or [], most_lost)
        return
    if most_lost is not None:
        raise ConfigError("most_lost: bits are not lost by weight; add --evict, or leave it out")
    if budget_bits is not None and quality is not None:
        raise ConfigError("quality: give a budget or a quality, not both")
    settings = settings.model_copy(update={"model": model})
    prompts = [read_text(path) for path in text or ()]
    path = checkpoint_path(settings)
    from kvkeep.inspect import calibrate as measure
    from kvkeep.models.text import TextModel
    from kvkeep.quant.calibration import Calibration

    tokenizer = TextModel.load(path)
    texts = [tokenizer.encode(prompt) for prompt in prompts]
    goal = measure.Goal(3.0 if budget_bits is None else budget_bits, quality)
    with counting_bar("measuring KV heads") as report:
        found = measure.calibrate(engine_options(settings), texts, goal, report)
    made = Calibration.of(found.info.digest, measure.layouts(found.chosen))
    written = made.write(path)
    rows = (
        (layer, *(f"{one[1]} bits ({c:+.2g})" for one, c in zip(names, costs, strict=True)))
        for layer, (names, costs) in enumerate(zip(made.layers, found.cost.tolist(), strict=True))
    )
    heads = (f"KV head {head}" for head in range(len(made.layers[0])))
    OUT.print(make_table(("layer", *heads), rows, title="keys, and what two bits would add"))
    OUT.print(
        f"divergence {found.divergence:.4g} nats a token; four bits everywhere {found.many:.4g},"
        f" two {found.few:.4g}"
    )
    NOTES.print(f"Wrote {written}; serve it with --kv calibrated")


def _calibrate_eviction(settings: Settings, files: list[Path], most_lost: float | None) -> None:
    """Measure which window and weight each head needs, and write them beside the checkpoint."""
    prompts = [read_text(path) for path in files]
    path = checkpoint_path(settings)
    from kvkeep.eviction.calibration import Calibration
    from kvkeep.eviction.corm import PRESETS
    from kvkeep.inspect import heads as measure
    from kvkeep.models.text import TextModel

    tokenizer = TextModel.load(path)
    texts = [tokenizer.encode(prompt) for prompt in prompts]
    part = measure.MOST_LOST if most_lost is None else most_lost
    with counting_bar("reading texts") as report:
        found = measure.calibrate(engine_options(settings), texts, part, PRESETS["corm"], report)
    written = Calibration(model=found.digest, layers=found.layers).write(path)
    rows = (
        (layer, *(f"w {r.window}, c {r.weight:g}: {k:.0%}" for r, k in zip(own, kept, strict=True)))
        for layer, (own, kept) in enumerate(zip(found.layers, found.kept.tolist(), strict=True))
    )
    names = (f"KV head {head}" for head in range(len(found.layers[0])))
    OUT.print(make_table(("layer", *names), rows, title="rules, and what they keep of these texts"))
    OUT.print(f"mean kept {found.kept.mean():.0%}, mean weight lost {found.lost.mean():.2%}")
    OUT.print(
        f"without this file the preset keeps {found.preset_kept:.0%} of these texts and loses"
        f" {found.preset_lost:.2%}"
    )
    NOTES.print(f"Wrote {written}; --evict corm takes it from there")
