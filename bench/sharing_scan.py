"""What the detector takes of a server's processor time, at the shapes of a small real model.

The demo model is so small that scanning shows beside it; a trace of its own kind, smaller, is
played to random weights of Qwen2.5-0.5B's shapes.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench import sharing_trace
from bench.harness import Estimate, Figure, Goal
from bench.sharing_replay import Player, replay, tenant_name
from bench.sharing_server import POLICIES, epochs_of, served
from bench.sharing_target import Ours
from bench.sharing_trace import PAGE, Shape, Texts
from kvkeep.models import make
from kvkeep.models.text import TextModel

LIKE: Final = "qwen2.5-0.5b"
SHAPE: Final = Shape(tenants=8, templates=2, epochs=3, requests_per_epoch=24)
EPOCH_S: Final = 10.0


def scan_share(threads: int) -> Figure:
    """Return the detector's share under `selective`, from the third epoch on."""
    selective = next(policy for policy in POLICIES if policy.name == "selective")
    trace = sharing_trace.make(SHAPE)
    pages = 2 * sharing_trace.isolation_pages(trace, SHAPE)
    least = SHAPE.tenants * (-(-SHAPE.longest // PAGE) + 2)
    shares = {tenant_name(n): 1 / SHAPE.tenants for n in range(SHAPE.tenants)}
    told = ("--threads", str(threads), *epochs_of(EPOCH_S))
    pool = ("--share-pool", f"{1 - least / pages:.4f}")
    with TemporaryDirectory() as folder:
        model = make.make(LIKE, Path(folder) / LIKE, seed=0)
        texts = Texts(TextModel.load(model), SHAPE)
        with served(selective, shares, pages, *told, *pool, model=model) as server:
            player = Player(Ours(server), texts, SHAPE, model.name)
            played = replay(player, trace, selective.settle_s(EPOCH_S))
    value, count = played.scan_share, len(played.samples)
    return Figure("scan_share", Estimate(value, value, value, count), Goal("<=", 0.02))
