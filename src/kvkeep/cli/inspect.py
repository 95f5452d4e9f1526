"""`kvkeep inspect`: pages of a prompt on one's own model: what coding costs, what lies there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvkeep.cli.console import NOTES
from kvkeep.cli.engine import checkpoint_path, engine_options
from kvkeep.cli.files import read_text
from kvkeep.cli.options import new_app, with_settings
from kvkeep.config import Settings
from kvkeep.errors import ConfigError

app = new_app("Look at a prompt's pages.")

LOCAL_SETTINGS = ("config", "model", "allow_download", "dtype", "weights", "kernel", "threads")


@app.callback()
def inspect() -> None:
    """Look at a prompt's pages."""


@app.command()
@with_settings(
    *LOCAL_SETTINGS, "kv", "kv_window_tokens", "shield", "transform_key", "transform_epoch"
)
def dump(
    settings: Settings,
    text: Annotated[Path, typer.Option(help="file with the prompt, which the dump holds as ids")],
    out: Annotated[Path, typer.Option("--out", "-o", help="dump, .npz")],
) -> None:
    """Write what a thief finds in layer 0's whole pages, for `kvkeep attack-cache`."""
    if settings.kv == "auto":
        raise ConfigError("kv: auto chooses by request; name one form, such as --kv k2v2")
    if out.suffix != ".npz":
        raise ConfigError(f"out: a dump is an .npz file; {out} is not called so")
    prompt = read_text(text)
    path = checkpoint_path(settings)
    from kvkeep.inspect.dump import dump_rows, save
    from kvkeep.models.text import TextModel

    ids = TextModel.load(path).encode(prompt)
    save(dump_rows(engine_options(settings), ids), out)
    NOTES.print(f"Wrote {out}: it holds the prompt's tokens; keep it private")


@app.command()
@with_settings(*LOCAL_SETTINGS, "kv", "kv_window_tokens")
def page(
    settings: Settings,
    text: Annotated[Path, typer.Option(help="file with the prompt; it is not shown anywhere")],
    number: Annotated[int, typer.Option("--page", min=0, help="which page of 64 tokens")],
    out: Annotated[Path, typer.Option("--out", "-o", help="picture: .svg, .png or .pdf")],
    as_json: Annotated[bool, typer.Option("--json", help="print the figures too")] = False,
) -> None:
    """Draw the error of a coded page by layer, head and channel, against one in 16 bits."""
    if settings.kv in {"bf16", "auto"}:
        raise ConfigError(
            f"kv: {settings.kv} names no codec to look at; choose one, such as --kv k2v2"
        )
    prompt = read_text(text)
    path = checkpoint_path(settings)
    try:
        from kvkeep.inspect import picture
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"out: pictures need {error.name}; install it with pip install 'kvkeep[figures]'"
        ) from None
    picture.check_format(out)
    from kvkeep.engine.build import codec_of
    from kvkeep.inspect.page import page_errors
    from kvkeep.models.text import TextModel

    options = engine_options(settings)
    ids = TextModel.load(path).encode(prompt)
    errors = page_errors(options, codec_of(options), ids, number)
    picture.save(errors, out)
    NOTES.print(f"Wrote {out}")
    if as_json:
        sys.stdout.write(msgspec.json.encode(errors).decode() + "\n")
