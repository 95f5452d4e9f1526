"""`kvkeep attack-cache FILE|DIR`: what do stolen pages say to somebody with the public weights?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvkeep.audit.stolen import Report, Stolen, attack_rows, open_public, read_stolen
from kvkeep.audit.stolen.rows import Form
from kvkeep.cli.console import OUT, make_table
from kvkeep.cli.files import read_text
from kvkeep.cli.options import new_app
from kvkeep.errors import ConfigError

app = new_app("See which tokens stolen pages give away.")

CLEAN, LEAK = 0, 3


def show(report: Report) -> None:
    """Print what each attack found and the verdict."""
    rows = [
        (
            finding.name,
            "not told" if finding.top1 is None else f"{finding.top1:.4f}",
            f"{finding.doubt:.3f}",
            finding.breaks,
        )
        for finding in report.findings
    ]
    title = f"{report.rows:,} rows of layer 0, {report.vocab_size:,} tokens in the vocabulary"
    OUT.print(make_table(("attack", "top-1", "doubt", "breaks"), rows, title=title))
    best, chance = report.best, 1 / report.vocab_size
    told = "sure of its guesses" if best.top1 is None else f"{best.top1:.1%} of tokens right"
    verdict = f"leak: {best.name}, {told}" if report.leaks else "nothing found above chance"
    OUT.print(f"{verdict} (a blind guess: {chance:.4%})")


def with_text(stolen: Stolen, model: Path, text: Path) -> Stolen:
    """Return the rows with the tokens of what was said."""
    from kvkeep.models.text import TextModel

    ids = TextModel.load(model).encode(read_text(text))
    if len(ids) < len(stolen):
        raise ConfigError(f"text: {len(ids)} tokens do not cover {len(stolen)} stolen rows")
    import numpy as np

    return replace(stolen, tokens=np.array(ids[: len(stolen)], np.int64))


@app.command()
def attack_cache(
    stolen: Annotated[
        Path, typer.Argument(help="dump of `kvkeep inspect dump`, raw pages, folder")
    ],
    model: Annotated[Path, typer.Option(help="checkpoint directory: the public weights")],
    text: Annotated[Path | None, typer.Option(help="what was said, to count right guesses")] = None,
    known: Annotated[int, typer.Option(min=0, help="leading tokens the attacker knows")] = 0,
    rows: Annotated[bool, typer.Option("--rows", help="raw pages lie as a device's do")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """See which tokens stolen pages give away: ends with 0 nothing, 3 a leak, 1 error."""
    public = open_public(model)
    form: Form = "rows" if rows else "lanes"
    found = read_stolen(stolen, public, form)
    if text is not None:
        found = with_text(found, model, text)
    if known and found.tokens is None:
        raise ConfigError("known: say what was known: a dump with its tokens, or --text FILE")
    if known >= len(found):
        raise ConfigError(f"known: {known} of {len(found)} rows leave none to guess")
    report = attack_rows(replace(found, known=known), public)
    if as_json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        show(report)
    raise typer.Exit(LEAK if report.leaks else CLEAN)
