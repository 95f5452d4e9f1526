"""`kvkeep detect FILE|-`: what in a text must stay private, and why."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kvkeep.cli.console import NOTES, OUT, make_table
from kvkeep.cli.options import new_app
from kvkeep.errors import ConfigError
from kvkeep.sharing.detector.default import load_detector
from kvkeep.sharing.detector.evaluate import Evaluation, evaluate, read_cases
from kvkeep.sharing.detector.explain import Explained, explain
from kvkeep.sharing.detector.organisation import OrganisationFile
from kvkeep.sharing.detector.scanner import Detector
from kvkeep.sharing.detector.spans import Recogniser, Verdict

app = new_app("Find what in a text must stay private; exit code 0: clear, 3: not clear, 1: error.")

NOT_CLEAR = 3
SHOWN_CHARACTERS = 48


def _detector(rules: Path | None, classifier: Path | None) -> Detector:
    more: list[Recogniser] = []
    if classifier is not None:
        from kvkeep.models.classifier import load_recogniser

        more.append(load_recogniser(classifier))
    return load_detector(None if rules is None else OrganisationFile(rules), more=more)


def _read(source: str) -> str:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror})") from None
    return data.decode("utf-8", "replace")


def _place(text: str, position: int) -> str:
    """Return line and column of a character, counted from 1."""
    before = text[:position]
    return f"{before.count(chr(10)) + 1}:{position - before.rfind(chr(10))}"


def _excerpt(text: str) -> str:
    """Return a span's text on one line, shortened in the middle."""
    line = " ".join(text.split())
    half = SHOWN_CHARACTERS // 2
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: half - 1]}…{line[-half:]}"


def _print_lines(found: list[Explained], *, reasons: bool) -> None:
    for span, reason in found:
        row = {**span._asdict(), "verdict": span.verdict.name.lower()}
        line = json.dumps(row | ({"reason": reason} if reasons else {}), ensure_ascii=False)
        OUT.print(line, markup=False)


def _print_table(text: str, found: list[Explained], *, reasons: bool) -> None:
    columns = ["verdict", "kind", "place", "score", "text", *(["why"] if reasons else [])]
    rows = [
        [
            span.verdict.name.lower(),
            span.kind,
            _place(text, span.start),
            f"{span.score:.2f}",
            escape(_excerpt(text[span.start : span.end])),
            *([escape(reason)] if reasons else []),
        ]
        for span, reason in found
    ]
    if rows:
        OUT.print(make_table(columns, rows))


def _print_evaluation(result: Evaluation, *, as_lines: bool) -> None:
    if as_lines:
        row = {
            "recall": result.recall,
            "false_positive_rate": result.false_positive_rate,
            "clean_passages": result.clean_passages,
            "kinds": {kind.kind: kind.recall for kind in result.kinds},
        }
        OUT.print(json.dumps(row, ensure_ascii=False), markup=False)
        return
    rows = [(k.kind, f"{k.recall:.3f}", f"{k.found}/{k.passages}") for k in result.kinds]
    OUT.print(make_table(("kind", "recall", "passages"), rows))
    if result.recall is not None:
        OUT.print(f"recall, mean over kinds: {result.recall:.3f}")
    if result.false_positive_rate is not None:
        OUT.print(
            f"false positives: {result.false_positive_rate:.3f} "
            f"({result.false_positives} of {result.clean_passages} clean passages)"
        )


@app.command()
def detect(
    source: Annotated[
        str | None, typer.Argument(metavar="FILE|-", help="text in UTF-8; - reads stdin")
    ] = None,
    explain_spans: Annotated[
        bool, typer.Option("--explain", help="name the rule or part that found each span")
    ] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="one JSON object a line, no text")] = False,
    labelled: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE.jsonl", help="measure on this file")
    ] = None,
    rules: Annotated[
        Path | None, typer.Option("--rules", metavar="ORG.toml", help="the organisation's rules")
    ] = None,
    classifier: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="local token classifier or GLiNER model beside the rest"),
    ] = None,
) -> None:
    """Find what in a text must stay private."""
    if (source is None) == (labelled is None):
        raise ConfigError("FILE: name a file, or - for stdin, or --eval with a labelled file")
    detector = _detector(rules, classifier)
    if labelled is not None:
        _print_evaluation(evaluate(detector, read_cases(labelled)), as_lines=jsonl)
        return
    text = _read(str(source))
    found = explain(detector, text)
    if jsonl:
        _print_lines(found, reasons=explain_spans)
    else:
        _print_table(text, found, reasons=explain_spans)
    verdict = max((item.span.verdict for item in found), default=Verdict.CLEAR)
    NOTES.print(f"{verdict.name.lower()}: {len(found)} spans in {len(text)} characters")
    if verdict is not Verdict.CLEAR:
        raise typer.Exit(NOT_CLEAR)
