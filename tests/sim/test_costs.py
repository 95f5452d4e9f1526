from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvkeep.errors import ConfigError
from kvkeep.sim.costs import Chunk, Step, fit_prefill, fit_steps, load_costs
from tests.sim.made import COSTS


def test_measured_chunks_give_back_what_made_them() -> None:
    chunks = [
        Chunk(tokens, context, COSTS.chunk_time_s(tokens, context))
        for tokens in (64, 256, 512)
        for context in (0, 1000, 4000)
    ]
    found = fit_prefill(chunks)
    told = (COSTS.chunk_s, COSTS.prefill_s_per_token, COSTS.prefill_s_per_token_pair)
    assert found == pytest.approx(told)


def test_measured_steps_of_all_codecs_share_what_does_not_read_the_cache() -> None:
    steps = {
        codec: [
            Step(rows, context, COSTS.step_time_s(codec, rows, context))
            for rows in (1, 4, 8)
            for context in (0, 5_000, 20_000)
        ]
        for codec in COSTS.codecs
    }
    found = fit_steps(steps)
    assert (found.step_s, found.row_s) == pytest.approx((COSTS.step_s, COSTS.row_s))
    told = {name: one.context_s_per_token for name, one in COSTS.codecs.items()}
    assert found.context_s == pytest.approx(told)


def test_no_part_of_a_step_takes_less_than_nothing() -> None:
    noisy = [Chunk(64, 0, 0.010), Chunk(128, 0, 0.022), Chunk(256, 0, 0.041), Chunk(64, 512, 0.010)]
    found = fit_prefill(noisy)
    assert min(found) >= 0
    assert found.chunk_s == 0.0
    assert found.token_s == pytest.approx(0.00016, rel=0.1)


def test_too_few_steps_fix_nothing() -> None:
    with pytest.raises(ConfigError, match="2 steps do not fix 3 factors"):
        fit_prefill([Chunk(64, 0, 0.01), Chunk(128, 0, 0.02)])


def test_recent_tokens_and_an_open_page_count_in_16_bits() -> None:
    assert COSTS.held_bytes("bf16", 100) == 100 * 1000
    assert COSTS.held_bytes("k2v2", 100) == 100 * 1000, "all within the window"
    assert COSTS.held_bytes("k2v2", 128 + 64 + 10) == 64 * 160 + (128 + 10) * 1000


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(msgspec.json.encode(COSTS))
    assert load_costs(path) == COSTS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step_s": -1.0}, "step_s is -1.0"),
        ({"codecs": {}}, "names no codec"),
        ({"unknown": 1}, "unknown"),
        ({"row_s": "fast"}, "row_s"),
        (
            {"codecs": {"a": {"bytes_per_token": -2, "context_s_per_token": 0}}},
            "codecs.a.bytes_per_token is -2",
        ),
    ],
)
def test_a_bad_file_is_refused_by_its_field(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(msgspec.json.encode(msgspec.to_builtins(COSTS) | change))
    with pytest.raises(ConfigError, match=said):
        load_costs(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read .*none\.json"):
        load_costs(tmp_path / "none.json")
