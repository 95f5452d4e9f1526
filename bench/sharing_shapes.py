"""What sharing is worth at the shapes of a small real model, by three policies that take turns.

The demo model computes a prompt so fast that the rest of a request shows beside it. Here the same
trace is played to random weights of Qwen2.5-0.5B's shapes, to servers that stand at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench import sharing_trace
from bench.sharing_replay import Player, Replay, take_turns, tenant_name, warm_up
from bench.sharing_server import POLICIES, Policy, epochs_of, served
from bench.sharing_target import Ours
from bench.sharing_trace import Ask, Shape, Texts
from kvkeep.cli.console import NOTES
from kvkeep.models import make
from kvkeep.models.text import TextModel

LIKE: Final = "qwen2.5-0.5b"
COMPARED: Final = ("isolate", "selective", "share_all")
EPOCH_S: Final = 10.0


def at_shapes(trace: Sequence[Ask], shape: Shape, like: str, threads: int) -> dict[str, Replay]:
    """Return the replay of each compared policy at a model's shapes."""
    pages = sharing_trace.pool_pages(trace, shape)
    shares = {tenant_name(n): 1 / shape.tenants for n in range(shape.tenants)}
    least = sharing_trace.least_pages(shape)
    told = ("--threads", str(threads), *epochs_of(EPOCH_S))
    pool = ("--share-pool", f"{1 - least / pages:.4f}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        model = make.make(like, folder / like, seed=0)
        texts = Texts(TextModel.load(model), shape)
        players: dict[str, Player] = {}
        for policy in compared():
            server = stack.enter_context(served(policy, shares, pages, *told, *pool, model=model))
            players[policy.name] = player = Player(Ours(server), texts, shape, model.name)
            warm_up(player, trace, policy.settle_s(EPOCH_S))
            NOTES.print(f"{policy.name} at {like}'s shapes: warm")
        return take_turns(players, trace)


def compared() -> list[Policy]:
    """Return the policies whose servers take turns."""
    return [policy for policy in POLICIES if policy.name in COMPARED]
