"""`kvkeep bench NAME`: run `bench/NAME.py` of a checkout."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvkeep.cli.options import new_app
from kvkeep.errors import ConfigError

app = new_app("Run a benchmark (from a checkout).")


def checkout() -> Path:
    """Return the root of the checkout this command runs in or was installed from."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (root / "bench" / "harness.py").is_file():
            return root
    raise ConfigError("bench: benchmarks come with a checkout; run this in one")


def names(root: Path) -> list[str]:
    """Return the benchmarks of a checkout: the files in `bench/` that run under their own name."""
    files = (root / "bench").glob("*.py")
    return sorted(p.stem for p in files if f'run("{p.stem}", ' in p.read_text(encoding="utf-8"))


@app.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    }
)
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="benchmark")] = "",
    *,
    told: Annotated[
        bool, typer.Option("--help", help="After a name: what it measures, and its flags.")
    ] = False,
) -> None:
    """Run a benchmark; its own flags follow its name: [--quick] [--json FILE|-] [--peer P]."""
    root = checkout()
    if told and not name:
        typer.echo(f"{context.get_help()}\n\nBenchmarks: {', '.join(names(root))}")
        return
    if name not in names(root):
        known = ", ".join(names(root)) or "none yet"
        raise ConfigError(f"name: there is no benchmark {name!r}; there are: {known}")
    sys.path.insert(0, str(root))
    main = importlib.import_module(f"bench.{name}").main
    raise typer.Exit(main([*context.args, "--help"] if told else context.args))
