"""Two distributions as inline SVG: histograms of hits and misses over one axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvkeep.audit.channel import Pair
from kvkeep.audit.stats import Samples

WIDTH: Final = 640
HEIGHT: Final = 150
LEFT: Final = 8
BOTTOM: Final = 24
BINS: Final = 48
HIT: Final = "#c2410c"
MISS: Final = "#1d4ed8"


def histogram(pairs: Sequence[Pair], unit: str) -> str:
    """Return an SVG of both distributions; the last bin holds what lies beyond the 99th percent."""
    values = np.asarray(pairs, np.float64)
    low, high = float(values.min()), float(np.percentile(values, 99))
    if high <= low:
        low, high = low - 0.5, low + 0.5
    edges = np.linspace(low, high, BINS + 1)
    hits, misses = (_counts(values[:, side], edges) for side in (0, 1))
    top = max(1, int(hits.max()), int(misses.max()))
    bars = [_bars(counts, top, colour) for counts, colour in ((misses, MISS), (hits, HIT))]
    ticks = [
        f'<text x="{LEFT + (WIDTH - 2 * LEFT) * share:.0f}" y="{HEIGHT - 6}" '
        f'text-anchor="{anchor}">{low + (high - low) * share:.4g} {unit}</text>'
        for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    ]
    base = HEIGHT - BOTTOM
    axis = f'<line x1="{LEFT}" y1="{base}" x2="{WIDTH - LEFT}" y2="{base}" stroke="#555"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>Hits and misses in {unit}</title>{''.join(bars)}{axis}{''.join(ticks)}</svg>"
    )


def _counts(values: Samples, edges: Samples) -> Samples:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return counts.astype(np.float64)


def _bars(counts: Samples, top: int, colour: str) -> str:
    width, base = (WIDTH - 2 * LEFT) / BINS, HEIGHT - BOTTOM
    bars = []
    for index, count in enumerate(counts):
        if count:
            height = (base - 6) * count / top
            bars.append(
                f'<rect x="{LEFT + index * width:.1f}" y="{base - height:.1f}" '
                f'width="{width - 1:.1f}" height="{height:.1f}"/>'
            )
    return f'<g fill="{colour}" fill-opacity="0.55">{"".join(bars)}</g>'
