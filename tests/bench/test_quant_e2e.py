from __future__ import annotations

from pathlib import Path

import pytest

from bench.harness import MIN_PAIRS, Estimate, Options
from bench.made_up import MadeUpPages
from bench.quant_e2e import BESIDE, CASES, CONTEXTS, LONGEST_FILL_S, at_context, beside, feasible
from kvkeep.errors import ConfigError
from kvkeep.quant.codec import Codec, Float, KVShape
from kvkeep.quant.hack import Hack
from kvkeep.sealing import SealContext
from kvkeep.types import Layout, PageKind, PageTag

SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=32, layout=Layout.BF16)


def sizes_of(tier: MadeUpPages, kind: PageKind) -> list[int]:
    """Return the bytes of each layer of a page."""
    found: list[int] = []
    context = SealContext("a", PageTag("a"), b"c", b"m", b"s", kind)
    assert tier.holds(context)
    tier.fetch(context, (0,) * 3, lambda _, data: found.append(len(data)), lambda _: None)
    return found


@pytest.mark.parametrize("codec", [Float(), Hack(Layout.K2V2)], ids=lambda codec: codec.name)
def test_made_up_pages_have_the_size_of_their_place(codec: Codec) -> None:
    spec = codec.page_spec(SHAPE)
    tier = MadeUpPages(codec, SHAPE)
    heads = SHAPE.num_kv_heads
    assert sizes_of(tier, PageKind.FIRST) == [heads * spec.first_tile_bytes] * 3
    assert sizes_of(tier, PageKind.PLAIN) == [heads * spec.tile_bytes] * 3


def test_goals_are_those_of_whole_steps() -> None:
    assert [(case.figure, case.goal.value) for case in CASES] == [
        ("e2e_decode_long_vs_bf16", 1.8),
        ("e2e_decode_4k_vs_bf16", 1.0),
        ("e2e_decode_long_vs_bf16_g7", 1.15),
    ]
    assert CASES[0].goal.status(Estimate(1.9, 1.85, 2.0, 30)) == "shown"


def test_a_peer_is_compared_at_the_longest_context_it_can_fill() -> None:
    assert feasible(())
    assert feasible((1.0, LONGEST_FILL_S / 4))
    assert not feasible((1.0, LONGEST_FILL_S / 4 + 1))


@pytest.mark.parametrize(
    ("prefix", "name", "status"),
    [(BESIDE.prefix, "e2e_vs_openvino_u8", "shown"), (CONTEXTS[1], "e2e_vs_openvino_u8_8k", None)],
)
def test_the_goal_is_that_of_the_longest_context(
    prefix: int, name: str, status: str | None
) -> None:
    figure, row = at_context(prefix, lambda: 15.0, lambda: 10.0, "openvino", MIN_PAIRS)
    assert figure.row()["figure"] == name
    assert figure.row()["status"] == status
    assert row["over theirs"] == 1.5


def test_a_peer_without_an_eight_bit_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose openvino"):
        beside("llamacpp", tmp_path, Options())
