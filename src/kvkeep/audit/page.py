"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Final

from kvkeep.audit.findings import Finding, Report, Verdict
from kvkeep.audit.svg import HIT, MISS, histogram

COLOURS: Final = {
    "leak": "#b91c1c",
    "clean": "#15803d",
    "void": "#a16207",
    "skipped": "#6b7280",
    "seen": "#0f766e",
}
MEANING: Final[Mapping[Verdict, str]] = {
    "leak": "One tenant can learn what another one sent.",
    "clean": "Nothing was seen by which one tenant could learn what another one sent.",
    "void": "This audit says nothing, neither that the target leaks nor that it does not.",
}
LEGEND: Final = (
    "AUC is the probability that a prompt which the victim had sent answers before a fresh one; "
    "won, the share of pairs in which it did. Chance is 0.5 in both. Intervals hold for all "
    "channels together. A channel is clean where both hold 0.5, AUC within the half-width asked "
    "for and won within twice that. KS p is the one-sided Kolmogorov-Smirnov test; it decides "
    "nothing."
)
CONTROLS: Final = (
    "The attacker asks for prompts of its own. Where these do not show, nothing else counts."
)
COLOUR_KEY: Final = (
    '<span class="hit">&#9632; sent before</span> <span class="miss">&#9632; never sent</span>'
)
STYLE: Final = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 64rem;
        margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
table.facts {{ width: auto; }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e5e7eb;
          vertical-align: top; }}
td.n {{ white-space: nowrap; }}
small {{ color: #6b7280; }}
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
        ("false alarm", f"probability {report.rates.alpha:g}, all channels together"),
        ("half-width asked for", f"± {report.rates.margin:g}"),
        ("seed", str(report.seed)),
    ]
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts)
    body = [
        f"<h1>Leak audit: {_tag(report.verdict)}</h1>",
        f"<p><b>{MEANING[report.verdict]}</b></p><p>{escape(report.reason)}.</p>",
        f'<table class="facts">{rows}</table>',
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
    heads = ("channel, and what it looks for", "verdict", "AUC", "won", "pairs", "KS p", "why")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<table><tr>{head}</tr>{''.join(map(_row, findings))}</table>"


def _row(finding: Finding) -> str:
    numbers = ("", "", "", "")
    if finding.evidence is not None:
        evidence = finding.evidence
        auc, won = (
            f"{one.value:.3f} &plusmn; {one.halfwidth:.3f}" for one in (evidence.auc, evidence.won)
        )
        numbers = (auc, won, str(evidence.pairs), f"{evidence.ks.p:.2g}")
    name = f"{escape(finding.facts.name)}<br><small>{escape(finding.facts.about)}</small>"
    figures = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in finding.figures.items())
    why = escape(finding.reason) + (f"<br><small>{escape(figures)}</small>" if figures else "")
    cells = "".join(f'<td class="n">{cell}</td>' for cell in (_tag(finding.outcome), *numbers))
    return f"<tr><td>{name}</td>{cells}<td>{why}</td></tr>"


def _plot(finding: Finding, prefix: str) -> str:
    title = f"{prefix}{finding.facts.name}, {finding.facts.observable.value}"
    return f"<h3>{escape(title)}</h3>{histogram(finding.pairs, finding.facts.unit)}"
