"""What codecs cost in quality: a frozen suite answered under each, item by item beside bfloat16.

The suite is `bench/traces/quality.json`; the model is the demo model, a toy, or the checkpoint of
`--model DIR`. `--only CODEC` measures one codec. Every codec sees the same split: what lies before
the current window is coded, one of 128 tokens but for codecs named after another. A codec that the
engine has kernels for is attended as codes; others are stored as what comes back of them, and
`k2v2-late` so once its prompt was computed in 16 bits. A name that ends in `+corm`, measured where
it is asked for, drops tokens by CORM's preset too. Contexts that were answered are kept in
`build/quality`, by commit: a run that was cut off goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from bench import harness, quality_stats
from bench.harness import Cell, Figure, Goal, Options, Report, Row
from bench.quality_kept import FOLDER, answered
from bench.quality_late import Late
from bench.quality_run import Asked, Machine, recorded
from bench.quality_stats import Drawn
from bench.quality_suite import TASKS, Maker, digest, read
from kvkeep.cli.console import NOTES
from kvkeep.config import DEMO_MODEL
from kvkeep.engine.build import codec_of
from kvkeep.engine.options import EngineOptions
from kvkeep.errors import ConfigError
from kvkeep.eviction.corm import PRESETS, Corm
from kvkeep.quant.baselines.base import KV, Baseline, Dequantised, Stored
from kvkeep.quant.baselines.blocks import Q4, Q8
from kvkeep.quant.baselines.cachegen import CacheGen
from kvkeep.quant.baselines.fp8 import Fp8
from kvkeep.quant.baselines.kivi import Kivi
from kvkeep.quant.baselines.kvquant import KvQuant
from kvkeep.quant.baselines.paper import HackPaper
from kvkeep.quant.codec import Codec, Float
from kvkeep.quant.hack import Hack
from kvkeep.types import WINDOW_STEP, Layout

GOALS: Final = {
    "k2v2": Goal("<=", 0.015),
    "k4v2": Goal("<=", 0.005),
    "k2v2+corm": Goal("<=", 0.025),
}
BESIDE: Final = {"kivi2": "k2v2", "kvquant": "k2v2", "cachegen": "k4v2"}
"""Codecs that ours must not lose to, by the one of ours that takes about as many bytes."""
LEARNT_FROM: Final = 24
"""Contexts that levels and tables are learnt from; they come from the suite with another seed."""
CODED_EVERY: Final = 64
"""Of how many pages and layers CacheGen's range coder really writes one, for its bytes."""

Sample = Sequence[Sequence[KV]]
Make = Callable[[Sample], Codec]


def _ours(layout: Layout, window_tokens: int = WINDOW_STEP, *, rotate: bool = True) -> Make:
    return lambda _: Hack(layout, window_tokens, rotate=rotate)


def _plain(kind: Callable[[], Baseline]) -> Make:
    return lambda _: Dequantised(kind())


CODECS: Final[dict[str, Make]] = {
    "k2v2": _ours(Layout.K2V2),
    "k4v2": _ours(Layout.K4V2),
    "kivi2": _plain(Kivi),
    "kvquant": lambda sample: Dequantised(KvQuant(sample)),
    "cachegen": lambda sample: Dequantised(CacheGen(sample), every=CODED_EVERY),
    "k4v4": _ours(Layout.K4V4),
    "k8v8": _ours(Layout.K8V8),
    "fp8": _plain(Fp8),
    "q8_0": _plain(Q8),
    "q4_0": _plain(Q4),
    "hack-paper": _plain(HackPaper),
    "k2v2-plain": _ours(Layout.K2V2, rotate=False),
    "k4v2-plain": _ours(Layout.K4V2, rotate=False),
    "k2v2-w256": _ours(Layout.K2V2, 256),
    "k2v2-w512": _ours(Layout.K2V2, 512),
    "hack-paper-nearest": _plain(lambda: HackPaper(stochastic=False)),
    "k2v2-late": lambda _: Late(Stored(Hack(Layout.K2V2))),
    "k2v2+corm": _ours(Layout.K2V2),
    "k4v2+corm": _ours(Layout.K4V2),
    "bf16+corm": lambda _: Float(),
}
EVICTING: Final = {
    "k2v2+corm": "combined_quality_loss",
    "k4v2+corm": "combined_quality_loss_k4v2",
    "bf16+corm": "combined_quality_loss_bf16",
}
"""With CORM beside them: their figures."""
ABLATIONS: Final = (
    "k2v2-plain",
    "k4v2-plain",
    "k2v2-w256",
    "k2v2-w512",
    "hack-paper-nearest",
    "k2v2-late",
)
"""Measured where they are asked for."""
CALIBRATED: Final = "calibrated"
"""The choice beside the checkpoint of `--model`, as `kvkeep model calibrate` wrote it."""
QUICK: Final = ("k2v2", "k4v2", "kivi2", "kvquant", "cachegen")


def chosen(options: Options) -> tuple[str, ...]:
    """Return the codecs to measure; raises `ConfigError` for one that there is not."""
    known = (*CODECS, CALIBRATED)
    for name in options.only:
        if name not in known:
            raise ConfigError(f"only: there is no codec {name!r}; there are: {', '.join(known)}")
    whole = tuple(name for name in CODECS if name not in (*ABLATIONS, *EVICTING))
    return options.only or (QUICK if options.quick else whole)


def made(name: str, sample: Sample, model: Path) -> Codec:
    """Return a codec by its name."""
    if name == CALIBRATED:
        return codec_of(EngineOptions(model=str(model), kv="calibrated"))
    return CODECS[name](sample)


def margins(draws: Mapping[str, Drawn], items: int) -> list[Figure]:
    """Return what others lose beyond ours in about as many bytes, as far as both were asked."""
    return [
        Figure(
            f"quality_loss_{other}_over_{ours}",
            quality_stats.apart(draws[other], draws[ours], items),
            Goal(">=", 0.0),
        )
        for other, ours in BESIDE.items()
        if {other, ours} <= draws.keys()
    ]


def measure(options: Options) -> Report:
    """Answer the suite under every codec."""
    names = chosen(options)
    suite = read()
    machine = Machine(Path(options.model or DEMO_MODEL), options.threads)
    plain = Asked(machine, Float())
    maker = Maker(suite, plain.text, plain.info.vocab_size)
    contexts = maker.contexts(quick=options.quick)
    if options.model is None and digest(maker.contexts()) != suite.digest:
        raise ConfigError("bench/traces/quality.json: the suite isn't the one that was committed")
    sample: Sample = ()
    if {"kvquant", "cachegen"} & set(names):
        other = Maker(suite, plain.text, plain.info.vocab_size, reseed=1)
        learnt = [c for c in other.contexts(quick=True) if c.ids][:LEARNT_FROM]
        sample = recorded(machine, learnt, plain.info.num_layers)
    del plain
    folder = None if options.model else FOLDER / ("quick" if options.quick else "full")
    base = answered("bf16", machine, contexts, Float(), folder=folder)
    rows: list[Row] = []
    figures: list[Figure] = []
    draws: dict[str, Drawn] = {}
    for name in names:
        evictor = Corm(PRESETS["corm"]) if name in EVICTING else None
        codec = made(name, sample, machine.model)
        found = answered(name, machine, contexts, codec, evictor, folder)
        tasks = [t for t in TASKS if any(item.task == t for item in base.items)]
        rows += [quality_stats.row(name, task, base.items, found.items) for task in tasks]
        draws[name] = quality_stats.drawn(base.items, found.items, suite.weights)
        loss = quality_stats.estimate(draws[name], len(base.items))
        NOTES.print(f"{name}: loss {loss.median:.4f} after {found.seconds:.0f} s")
        figure = EVICTING.get(name, f"quality_loss_{name.replace('-', '_')}")
        figures.append(Figure(figure, loss, GOALS.get(name)))
        row: Row = {
            "codec": name,
            "loss": loss.median,
            "bytes_over_bf16": found.bytes_ratio,
            "seconds": found.seconds,
        }
        rows.append(row if evictor is None else {**row, "kept": found.kept})
    params: dict[str, Cell] = {
        "model": Path(options.model).name if options.model else "demo, a toy",
        "items": len(base.items),
        "threads": options.threads,
        "quick": options.quick,
    }
    figures += margins(draws, len(base.items))
    return Report("quality", params, figures, rows)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line."""
    return harness.run("quality", arguments, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
