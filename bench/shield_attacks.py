"""What stolen pages say: tokens of layer 0's rows that public weights name, per mode.

Two models: the demo model, whose weights were trained, and random weights of Qwen2.5-0.5B's shapes
with its 151,936 tokens, one layer of them. Prompts are random tokens: real text is easier. And what
the demo model answers about held-out texts, whose pages another engine goes on from.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch

from bench.harness import Cell, Estimate, Figure, Goal, Options, Row
from bench.shield_seal import OwnKeys, context
from kvkeep.audit.stolen import (
    ATTACKS,
    PublicModel,
    Report,
    Stolen,
    attack_rows,
    open_public,
)
from kvkeep.audit.stolen.rows import rows_of_bytes
from kvkeep.config import DEMO_MODEL
from kvkeep.engine.options import EngineOptions, KvName, ShieldName
from kvkeep.engine.shields import shield_of
from kvkeep.inspect.dump import dump_rows
from kvkeep.inspect.injection import inject, steal
from kvkeep.models import make
from kvkeep.models.text import TextModel
from kvkeep.quant.codec import pack_float_tiles
from kvkeep.shield.cipher import FrameSealer
from kvkeep.shield.frame import HEADER_BYTES
from kvkeep.types import PAGE_TOKENS, Layout

LIKE: Final = "qwen2.5-0.5b"
ROWS: Final = 512
VOCABULARIES: Final = 20
"""Of rows of sealed bytes: so many are guessed right by accident."""
MODES: Final[tuple[ShieldName, ...]] = ("off", "perm", "orth", "mask")
FORMS: Final[tuple[KvName, ...]] = ("bf16", "k2v2")
"""Of the demo model's pages, where an attacker who knows a quarter of the text tries too; the large
vocabulary is asked the one question that the summary needs.
"""
ASKED: Final = 12
"""Held-out texts whose pages are gone on from."""
NAMED: Final = {"off": "plain", "perm": "perm", "orth": "orth"}
"""Modes with a figure of the summary."""


def figures(options: Options) -> tuple[list[Figure], list[Row]]:
    """Steal pages of every mode and form, then sealed ones."""
    rows: list[Row] = []
    least: dict[str, Estimate] = {}
    with TemporaryDirectory() as folder:
        cases = [(DEMO_MODEL, FORMS)]
        if not options.quick:
            cases.append((make.make(LIKE, Path(folder) / LIKE, seed=0, layers=1), FORMS[:1]))
        for model, forms in cases:
            public = open_public(model)
            for mode, kv in product(MODES, forms):
                stolen = steal_rows(model, public, mode, kv, options)
                blind = attack_rows(stolen, public)
                rows.append(row_of(model, mode, kv, blind))
                if len(forms) > 1:
                    told = attack_rows(replace(stolen, known=len(stolen) // 4), public)
                    rows.append(row_of(model, mode, kv, told))
                own = share_of(blind)
                if kv == "bf16" and (mode not in least or own.median < least[mode].median):
                    least[mode] = own
    sealed = attack_rows(sealed_rows(open_public(DEMO_MODEL)), open_public(DEMO_MODEL))
    rows.append(row_of(DEMO_MODEL, "seal", "bf16", sealed))
    rows += [injected(mode, options) for mode in MODES]
    found = [Figure(f"attack_top1_{NAMED[m]}", least[m], Goal(">=", 0.95)) for m in NAMED]
    over = share_of(sealed)
    median, low, high = (share * sealed.vocab_size for share in over[:3])
    times = Estimate(median, low, high, over.samples)
    return [*found, Figure("attack_top1_sealed_over_chance", times, Goal("<=", 5.0))], rows


def steal_rows(
    model: Path, public: PublicModel, mode: ShieldName, kv: KvName, options: Options
) -> Stolen:
    """Run random tokens through an engine and return what its pages hold."""
    count = 256 if options.quick else ROWS
    ids = [int(i) for i in np.random.default_rng(0).integers(0, public.vocab_size, count)]
    settings = EngineOptions(
        model=str(model),
        threads=options.threads,
        kv_cache_bytes=256 << 20,
        kv=kv,
        shield=mode,
    )
    found = dump_rows(settings, ids)
    return Stolen(found.k, found.v, found.tokens)


def injected(mode: ShieldName, options: Options) -> Row:
    """Return how often the model tells a thief what stolen pages hold."""
    text = TextModel.load(DEMO_MODEL)
    lines = (DEMO_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    asked = []
    for line in lines:
        *begun, last = json.loads(line)["messages"][:3]
        ids = list(text.apply_chat(begun))
        tail = ids[len(ids) // PAGE_TOKENS * PAGE_TOKENS :]
        if len(tail) < len(ids) and last["content"] not in text.decode(tail):
            asked.append((ids, text.encode(last["content"])))
    asked = asked[: 2 if options.quick else ASKED]
    settings = EngineOptions(
        model=str(DEMO_MODEL), threads=options.threads, kv_cache_bytes=64 << 20, shield=mode
    )
    right = 0
    for ids, expected in asked:
        stolen = steal(settings, shield_of(settings), ids)
        said = inject(settings, stolen, ids[stolen.k.shape[1] :], len(expected))
        right += said == list(expected)
    return {"injected": mode, "asked": len(asked), "answered_right": right / len(asked)}


def sealed_rows(public: PublicModel) -> Stolen:
    """Return rows read from the sealed bytes of pages with random tokens."""
    tokens = np.random.default_rng(1).integers(
        0, public.vocab_size, VOCABULARIES * public.vocab_size
    )
    layer_bytes = 2 * 2 * public.heads * PAGE_TOKENS * public.head_dim
    sizes, others = [layer_bytes] * public.num_layers, bytes((public.num_layers - 1) * layer_bytes)
    sealer, bodies = FrameSealer(OwnKeys()), []
    for begin in range(0, len(tokens), PAGE_TOKENS):
        at = tokens[begin : begin + PAGE_TOKENS]
        k, v = (
            torch.tensor(x[at]).transpose(0, 1).bfloat16() for x in (public.keys, public.values)
        )
        page = pack_float_tiles(k, v, Layout.BF16).tobytes() + others
        frame = sealer.seal(context("victim"), page, sizes)
        bodies.append(frame[HEADER_BYTES : HEADER_BYTES + len(page)])
    stolen = rows_of_bytes(b"".join(bodies), public)
    return replace(stolen, tokens=tokens[: len(stolen)])


def row_of(model: Path, mode: ShieldName, kv: str, report: Report) -> Row:
    """Return what the best attack found as a row."""
    cells: dict[str, Cell] = {
        "stolen": mode,
        "model": model.name,
        "kv": kv,
        "rows": report.rows,
        "known": report.known,
        "vocabulary": report.vocab_size,
        "best_attack": report.best.name,
        "top1": report.best.top1,
        "over_chance": report.over_chance,
    }
    told = {finding.name: finding.top1 for finding in report.findings}
    return {**cells, **{attack.name: told.get(attack.name) for attack in ATTACKS}}


def share_of(report: Report) -> Estimate:
    """Return the best attack's share of right guesses and its 95 % interval (Wilson)."""
    n, z = report.rows, 1.96
    p = report.best.top1 or 0.0
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    return Estimate(p, (middle - half) / scale, (middle + half) / scale, n)
