"""A coded page's errors as a picture: heat maps by channel, bars by head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from kvkeep.errors import ConfigError
from kvkeep.inspect.page import PageErrors
from kvkeep.types import PAGE_TOKENS

FORMATS: Final = (".svg", ".png", ".pdf")
COLOURS: Final = "magma"
BEFORE: Final = "#f59e0b"
STORED: Final = "#7c3aed"
WIDTH_IN: Final = 11.0
ROW_IN: Final = 0.2
"""Height of a layer and head, in inches; small ones are given more."""
LABELLED_ROWS: Final = 40
"""Up to so many rows are named one by one; of more, every layer is."""
LABELLED_CELLS: Final = 64

Grid = NDArray[np.float64]


def check_format(out: Path) -> None:
    """Raise `ConfigError` for a file that no picture can be written to."""
    if out.suffix not in FORMATS:
        raise ConfigError(f"out: {out.name} names no format; end it with {', '.join(FORMATS)}")


def save(errors: PageErrors, out: Path) -> None:
    """Write a picture, in the format of the file's ending."""
    check_format(out)
    with rc_context({"svg.hashsalt": "kvkeep", "svg.fonttype": "none", "font.size": 9}):
        figure = draw(errors)
        try:
            metadata = {"Date": None} if out.suffix == ".svg" else None
            figure.savefig(out, dpi=150, metadata=metadata)
        except OSError as error:
            raise ConfigError(f"out: can't write {out}: {error.strerror}") from None


def draw(errors: PageErrors) -> Figure:
    """Return the figure: keys and values by channel, with their heads; attention by query head."""
    layers, heads = np.shape(errors.k_heads)
    rows = max(layers * heads * ROW_IN, 1.5)
    below = max(layers * ROW_IN, 1.2)
    figure = Figure((WIDTH_IN, 2 * rows + below + 2.6), layout="constrained")
    last = errors.first_position + PAGE_TOKENS - 1
    figure.suptitle(
        f"{errors.codec} against {errors.dtype}: page {errors.page}, tokens"
        f" {errors.first_position} to {last} of {errors.tokens}\n"
        f"{errors.model}, digest {errors.digest[:16]}"
    )
    axes = figure.subplots(
        3, 2, width_ratios=(4, 1.25), height_ratios=(rows, rows, below), squeeze=True
    )
    parts = (
        ("keys", errors.k_channels, errors.k_heads, errors.k_heads_before),
        ("values", errors.v_channels, errors.v_heads, errors.v_heads_before),
    )
    for (left, right), (what, channels, stored, before) in zip(axes[:2], parts, strict=True):
        grid = np.array(channels).reshape(layers * heads, -1)
        image = _heat(left, grid)
        left.set(title=f"error of {what}, by channel", xlabel="channel of the head")
        _name_rows(left, layers, heads)
        figure.colorbar(image, ax=left, extend="max", pad=0.01).set_label("RMS error / RMS")
        _bars(right, np.ravel(stored), np.ravel(before), what)
    _attention(figure, axes[2][0], np.array(errors.attention_heads))
    _legend(axes[2][1], *axes[1][1].get_legend_handles_labels())
    return figure


def _heat(axes: Axes, grid: Grid) -> AxesImage:
    top = float(np.percentile(grid, 99)) or 1.0
    return axes.imshow(
        grid, cmap=COLOURS, vmin=0.0, vmax=top, aspect="auto", interpolation="nearest"
    )


def _name_rows(axes: Axes, layers: int, heads: int) -> None:
    """Name the rows of a map by layer and head, or by layer where they are many."""
    if layers * heads <= LABELLED_ROWS:
        names = [f"{layer} / {head}" for layer in range(layers) for head in range(heads)]
        axes.set_yticks(range(layers * heads), names)
        axes.set_ylabel("layer / KV head")
    else:
        every = -(-layers // LABELLED_ROWS)
        shown = range(0, layers, every)
        axes.set_yticks([layer * heads for layer in shown], [str(layer) for layer in shown])
        axes.set_ylabel(f"layer, {heads} KV heads each")
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="white", linewidth=0.4)


def _bars(axes: Axes, stored: Grid, before: Grid, what: str) -> None:
    at = np.arange(len(stored))
    axes.barh(at, stored, height=0.8, color=STORED, label="as stored")
    axes.barh(
        at, before, height=0.35, color=BEFORE, label="carried in:\nover coded pages,\nnot yet coded"
    )
    axes.set(title=f"{what}, by head", xlabel="RMS error / RMS", yticks=[])
    axes.set_ylim(len(stored) - 0.5, -0.5)
    axes.set_xlim(0, max(float(stored.max()), float(before.max()), 1e-9) * 1.1)
    axes.set_axisbelow(True)
    axes.grid(axis="x", linewidth=0.3)


def _attention(figure: Figure, axes: Axes, grid: Grid) -> None:
    image = _heat(axes, grid)
    layers, heads = grid.shape
    axes.set(
        title="error of attention's output, last token, all pages",
        xlabel="query head",
        ylabel="layer",
        xticks=range(0, heads, -(-heads // LABELLED_ROWS)),
        yticks=range(0, layers, -(-layers // LABELLED_ROWS)),
    )
    figure.colorbar(image, ax=axes, extend="max", pad=0.01).set_label("error norm / norm")
    if grid.size <= LABELLED_CELLS:
        for (layer, head), value in np.ndenumerate(grid):
            ink = "black" if value > 0.6 * image.get_clim()[1] else "white"
            axes.text(head, layer, f"{value:.3f}", ha="center", va="center", color=ink)


def _legend(axes: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    axes.axis("off")
    axes.legend(handles, labels, loc="upper left", frameon=False, title="bars")
