"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import Final

from kvkeep.audit.findings import Finding, Report
from kvkeep.audit.svg import HIT, MISS, histogram

COLOURS: Final = {
    "leak": "#b91c1c",
    "clean": "#15803d",
    "void": "#a16207",
    "skipped": "#6b7280",
    "seen": "#0f766e",
}
LEGEND: Final = (
    "AUC is the probability that a prompt which the victim had sent answers first; chance is 0.5. "
    "Intervals hold for all channels together. KS is the one-sided Kolmogorov-Smirnov test."
)
CONTROLS: Final = (
    "The attacker asks for prompts of its own. Where these do not show, nothing else counts."
)
COLOUR_KEY: Final = (
    '<span class="hit">&#9632; sent before</span> <span class="miss">&#9632; never sent</span>'
)
STYLE: Final = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 60rem;
        margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e5e7eb;
          vertical-align: top; }}
svg {{ width: 100%; height: auto; font: 11px system-ui, sans-serif; }}
b.tag {{ color: white; border-radius: .3rem; padding: .1rem .5rem; }}
.hit {{ color: {HIT}; }} .miss {{ color: {MISS}; }}
"""


def html(report: Report) -> str:
    """Return the page."""
    facts = [
        ("target", report.target),
        ("model", report.model),
        ("prompts", f"{report.prompt_tokens} tokens"),
        ("requests", f"{report.requests:,} in {report.seconds:.0f} s"),
        ("false alarms", f"{report.rates.alpha:g} over {report.rates.channels} channels"),
        ("half-width asked for", f"{report.rates.margin:g}"),
        ("seed", str(report.seed)),
    ]
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts)
    body = [
        f"<h1>Leak audit: {_tag(report.verdict)}</h1><p>{escape(report.reason)}.</p>",
        f"<table>{rows}</table>",
        "<h2>Channels</h2>",
        _table(report.channels),
        f"<p>{LEGEND}</p><h2>Controls</h2><p>{CONTROLS}</p>",
        _table(report.controls),
        "<h2>Distributions</h2>",
        f"<p>{COLOUR_KEY}</p>",
        *(_plot(finding, "control: ") for finding in report.controls if finding.pairs),
        *(_plot(finding, "") for finding in report.channels if finding.pairs),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Leak audit: {escape(report.verdict)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _tag(outcome: str) -> str:
    return f'<b class="tag" style="background:{COLOURS[outcome]}">{outcome}</b>'


def _table(findings: tuple[Finding, ...]) -> str:
    head = "".join(f"<th>{h}</th>" for h in ("channel", "", "AUC", "pairs", "KS p", "why"))
    return f"<table><tr>{head}</tr>{''.join(map(_row, findings))}</table>"


def _row(finding: Finding) -> str:
    auc = pairs = ks = ""
    if finding.evidence is not None:
        auc = f"{finding.evidence.auc.value:.3f} &plusmn; {finding.evidence.auc.halfwidth:.3f}"
        pairs, ks = str(finding.evidence.pairs), f"{finding.evidence.ks.p:.2g}"
    figures = ", ".join(f"{k} {v:.3g}" for k, v in finding.figures.items())
    why = f"{escape(finding.facts.about)}: {escape(finding.reason)}" + (
        f"<br><small>{escape(figures)}</small>" if figures else ""
    )
    cells = (escape(finding.facts.name), _tag(finding.outcome), auc, pairs, ks, why)
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _plot(finding: Finding, prefix: str) -> str:
    title = f"{prefix}{finding.facts.name}, {finding.facts.observable.value}"
    return f"<h3>{escape(title)}</h3>{histogram(finding.pairs, finding.facts.unit)}"
