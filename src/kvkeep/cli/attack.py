"""`kvkeep attack URL`: does a server let one tenant learn what another one sent?"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from kvkeep.audit import Finding, Options, Report, audit, cast_of
from kvkeep.audit.channels import CHANNELS
from kvkeep.audit.page import html
from kvkeep.cli.console import NOTES, OUT, make_table
from kvkeep.cli.options import new_app
from kvkeep.errors import ConfigError

app = new_app("Test a server for leaks between tenants.")

QUICK_MARGIN = 0.05
FULL_MARGIN = 0.02
QUICK_S = 600.0
FULL_S = 5400.0

Keys = Annotated[
    list[str] | None,
    typer.Option("--key", help="victim, attacker, then sybils: NAME=KEY, NAME=@FILE, NAME=env:VAR"),
]
Channels = Annotated[str, typer.Option(help="comma-separated: " + ", ".join(CHANNELS))]


def row(finding: Finding) -> tuple[str, ...]:
    """Return a finding as a row of the terminal's table."""
    if finding.evidence is None:
        return finding.facts.name, finding.outcome, "", "", finding.reason
    auc = finding.evidence.auc
    return (
        finding.facts.name,
        finding.outcome,
        f"{auc.value:.3f} ± {auc.halfwidth:.3f}",
        str(finding.evidence.pairs),
        finding.reason,
    )


def show(report: Report) -> None:
    """Print the tables and the verdict."""
    columns = ("channel", "verdict", "AUC", "pairs", "why")
    controls = [("control: " + name, *rest) for name, *rest in map(row, report.controls)]
    OUT.print(make_table(columns, [*controls, *map(row, report.channels)], title=report.target))
    OUT.print(
        f"{report.verdict}: {report.reason} ({report.requests:,} requests, "
        f"{report.seconds:.0f} s, prompts of {report.prompt_tokens} tokens, seed {report.seed})"
    )


def require_folder(path: Path | None, option: str) -> None:
    """Raise `ConfigError` where a report could not be written: an audit takes minutes."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {path.parent}; make it first")


def write(path: Path | None, text: str, option: str) -> None:
    """Write a report where one was asked for."""
    if path is None:
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}: can't write {path}: {error.strerror}") from None


def read(path: Path | None) -> str:
    """Return the text that prompts are to begin with."""
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"behind: can't read {path}: {error}") from None


@app.command()
def attack(
    url: Annotated[str, typer.Argument(help="server, such as http://127.0.0.1:8000")],
    key: Keys = None,
    model: Annotated[str | None, typer.Option(help="default: the first one served")] = None,
    channels: Channels = "",
    full: Annotated[bool, typer.Option("--full", help="intervals of ±0.02, not ±0.05")] = False,
    seconds: Annotated[float | None, typer.Option(help="time at most (default: 600)")] = None,
    settle: Annotated[float, typer.Option(help="seconds between victim and attacker")] = 0.0,
    rate: Annotated[float, typer.Option(help="requests per second at most")] = 100.0,
    alpha: Annotated[float, typer.Option(help="probability of a false alarm, in all")] = 0.05,
    prompt_tokens: Annotated[int, typer.Option(help="length of the first prompts")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(help="length they may grow to")] = 2048,
    behind: Annotated[Path | None, typer.Option(help="text file that prompts begin with")] = None,
    answer_tokens: Annotated[int, typer.Option(help="of an answer; 1 looks like a probe")] = 1,
    consent: Annotated[str | None, typer.Option(help="token that the target serves")] = None,
    seed: Annotated[int | None, typer.Option(help="of prompts and coins (default: random)")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="report as JSON")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="report as HTML")] = None,
) -> None:
    """Test a server for leaks between tenants: ends with 0 clean, 3 leak, 4 void, 1 error."""
    require_folder(json_file, "json")
    require_folder(html_file, "html")
    options = Options(
        url=url,
        cast=cast_of(key or []),
        model=model,
        channels=tuple(name.strip() for name in channels.split(",") if name.strip()),
        alpha=alpha,
        margin=FULL_MARGIN if full else QUICK_MARGIN,
        seconds=seconds if seconds is not None else FULL_S if full else QUICK_S,
        settle_s=settle,
        # What waits for an epoch's end waits for many pairs at once.
        batch=64 if settle else 4,
        per_second=rate,
        prompt_tokens=prompt_tokens,
        max_prompt_tokens=max_prompt_tokens,
        behind=read(behind),
        answer_tokens=answer_tokens,
        consent=consent,
        seed=seed,
    )
    report = asyncio.run(audit(options, note=NOTES.print))
    show(report)
    write(json_file, json.dumps(report.document(), indent=1) + "\n", "json")
    write(html_file, html(report), "html")
    raise typer.Exit(report.exit_code)
