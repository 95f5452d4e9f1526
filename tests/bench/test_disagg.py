"""What `kvkeep bench disagg` plays and how it counts, without its workers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import (
    disagg,
    disagg_costs,
    disagg_figures,
    disagg_forms,
    disagg_kept,
    disagg_overhead,
    disagg_published,
    disagg_workers,
    harness,
)
from bench.disagg_coder import Interleaved
from bench.disagg_costs import ROWS
from bench.disagg_forms import FormSealer, normal_page
from bench.disagg_load import (
    BASE,
    CELLS,
    COLOCATED,
    MOST_TOKENS,
    OURS,
    STREAMED,
    Cell,
    Measured,
    Part,
    Played,
    Run,
    drawn,
    handover_s,
    link_bytes_per_s,
    part_names,
    part_of,
    phases_of,
)
from bench.harness import Options
from kvkeep.engine.api import GenerateRequest
from kvkeep.engine.moments import Moments
from kvkeep.errors import ConfigError, SealError
from kvkeep.quant.baselines.cachegen import CacheGen
from kvkeep.quant.codec import KVShape, Place, pack_float_tiles, unpack_float_tiles
from kvkeep.sealing import SealContext, layers_of
from kvkeep.sim.cluster import PHASES
from kvkeep.sim.costs import Chunk, Step
from kvkeep.sim.load import TRACES, Drawn
from kvkeep.types import Layout, PageTag
from tests.sim.made import COSTS

SHAPE = KVShape(num_layers=4, num_kv_heads=2, head_dim=32, layout=Layout.BF16)
PHASE_AT = {name: at for at, name in enumerate(PHASES)}


def played(jct_s: float, **others: object) -> Played:
    told = {
        "prompt_tokens": 256,
        "answer_tokens": 8,
        "at_s": 0.0,
        "ttft_s": jct_s / 2,
        "jct_s": jct_s,
        "phases": (0.0,) * len(PHASES),
        "split": True,
        "handover_s": 0.004,
        "received_bytes": 4000,
        "received_pages": 4,
    }
    return Played(**(told | others))  # type: ignore[arg-type]


def part(*runs: Run, trace: str = "azure_conv") -> Part:
    chunks = [
        Chunk(tokens, 0, COSTS.chunk_time_s(tokens, 0), 1) for tokens in (128, 256, 512, 1024)
    ]
    steps = [Step(rows, 99 * rows, COSTS.step_time_s("bf16", rows, 99 * rows)) for rows in ROWS]
    steps += [Step(1, 900, COSTS.step_time_s("bf16", 1, 900))]
    one = Measured(chunks, steps, COSTS.bytes_per_token, 0.0, COSTS.handover_s)
    return Part(trace, 42, 1e6, 1e-3, 0.4, 0.5, {"bf16": one, "k2v2": one}, runs, 0)


def turns(variant: str, rate: float, *jct_s: float) -> list[Run]:
    return [Run(variant, rate, "poisson", at, (played(took),)) for at, took in enumerate(jct_s)]


@pytest.mark.parametrize("trace", TRACES)
def test_runs_of_a_trace_ask_for_about_as_much(trace: str) -> None:
    loads = [drawn(trace, 12, CELLS[0], 0.5, seed) for seed in range(8)]
    sums = [int(load.prompt_tokens.sum()) for load in loads]
    assert max(sums) < 1.7 * min(sums)
    for load in loads:
        assert (load.prompt_tokens + load.answer_tokens).max() <= MOST_TOKENS
        assert min(load.prompt_tokens.min(), load.answer_tokens.min()) >= 1
        assert load.at_s[0] == 0.0
        assert np.all(np.diff(load.at_s) >= 0)
    again = drawn(trace, 12, CELLS[0], 0.5, 0)
    assert all(np.array_equal(a, b) for a, b in zip(again, loads[0], strict=True))
    assert not np.array_equal(loads[0].prompt_tokens, loads[1].prompt_tokens)


def test_requests_come_at_their_part_of_the_capacity() -> None:
    load = drawn("azure_conv", 4000, Cell(0.5, "poisson"), 3.0, 0)
    assert 4000 / load.at_s[-1] == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize("share", [10, 25, 42])
def test_a_link_is_as_slow_as_its_share_asks(share: int) -> None:
    moved_s = 3e6 / link_bytes_per_s(3e6, 2.0, share)
    assert moved_s / (moved_s + 2.0) == pytest.approx(share / 100)


def test_phases_add_up_and_what_is_hidden_is_not_counted() -> None:
    there = Moments(arrived_s=10.1, begun_s=11.0, encode_s=0.5, first_token_s=14.0, ended_s=14.0)
    here = Moments(
        arrived_s=10.1,
        begun_s=16.2,
        first_token_s=14.1,
        received_s=15.5,
        installed_s=15.75,
        resumed_s=16.0,
        ended_s=18.0,
    )
    found = dict(zip(PHASES, phases_of(10.0, 18.25, (there, here)), strict=True))
    assert found == pytest.approx(
        {
            "queue": 1.0,
            "prefill": 2.5,
            "quantise": 0.5,
            "transfer": 1.5,
            "install": 0.25,
            "decode": 2.0,
            "other": 0.5,
        }
    )
    assert handover_s((there, here)) == pytest.approx(0.25)
    here.received_s = here.installed_s = 13.0
    hidden = dict(zip(PHASES, phases_of(10.0, 18.25, (there, here)), strict=True))
    assert hidden["transfer"] == hidden["install"] == 0.0
    assert sum(hidden.values()) == pytest.approx(8.25)
    assert handover_s((there, here)) == pytest.approx(1.9), "since its first token was told"


def test_a_request_that_stays_has_no_handover() -> None:
    own = Moments(arrived_s=1.0, begun_s=2.0, first_token_s=3.0, resumed_s=3.1, ended_s=4.0)
    found = dict(zip(PHASES, phases_of(1.0, 4.5, (own,)), strict=True))
    assert found["transfer"] == found["install"] == 0.0
    assert (found["queue"], found["prefill"], found["decode"]) == pytest.approx((1.0, 1.0, 0.9))
    assert sum(found.values()) == pytest.approx(3.5)
    assert handover_s((own,)) is None


def test_reductions_pair_turns_and_the_largest_is_that_of_a_place() -> None:
    slow = turns(BASE.name, 0.95, 10.0, 20.0)
    fast = turns(OURS.name, 0.95, 2.0, 5.0)
    mild = part(*turns(BASE.name, 0.5, 10.0), *turns(OURS.name, 0.5, 8.0), trace="azure_code")
    figures = disagg_figures.reduction_figures([part(*slow, *fast), mild])
    found = {one.name: one.estimate for one in figures}
    most, mean = found["jct_reduction_vs_bf16_max"], found["jct_reduction_vs_bf16_mean"]
    assert most.median == pytest.approx(0.775)
    assert mean.median == pytest.approx(1.75 / 3)
    assert (most.samples, mean.samples) == (2, 3)
    assert mean.low <= mean.median <= mean.high
    assert "jct_reduction_vs_kvquant_max" not in found, "it was not played"


def test_a_second_helping_adds_turns_to_its_place() -> None:
    one, two = (
        part(*turns(BASE.name, 0.95, 10.0), *turns(OURS.name, 0.95, took)) for took in (2.0, 4.0)
    )
    (most, *_) = disagg_figures.reduction_figures([one, two])
    assert most.estimate.samples == 2
    assert most.estimate.median == pytest.approx(0.7)


def test_bytes_are_those_of_pages_that_came() -> None:
    def run(variant: str, *sizes: tuple[int, int]) -> Run:
        requests = (played(1.0, received_pages=pages, received_bytes=size) for pages, size in sizes)
        return Run(variant, 0.5, "poisson", 0, tuple(requests))

    plain = run(STREAMED.name, (4, 64_000), (2, 32_000), (0, 0))
    coded = run(OURS.name, (4, 11_000), (2, 6000), (0, 0))
    figures = {one.name: one for one in disagg_figures.transfer_figures([part(plain, coded)])}
    assert figures["transfer_bytes_ratio"].estimate.median == pytest.approx(2500 / 16_000)
    assert figures["handover_ms_p50"].estimate.median == pytest.approx(4.0)


def test_pages_that_did_not_come_are_seen() -> None:
    came = played(1.0, prompt_tokens=300, received_pages=4)
    lost = played(1.0, prompt_tokens=300, received_pages=0)
    stays = played(1.0, prompt_tokens=900, received_pages=0, split=False)
    assert disagg_figures.handed_share([came, stays], BASE) == 1.0
    assert disagg_figures.handed_share([came, lost], OURS) == 0.5
    assert disagg_figures.handed_share([stays], OURS) is None


def test_exposed_transfer_is_a_share_of_the_whole_time() -> None:
    phases = [0.0] * len(PHASES)
    phases[PHASE_AT["transfer"]] = 0.5
    run = Run(OURS.name, 0.5, "poisson", 0, (played(4.0, phases=tuple(phases)), played(6.0)))
    assert disagg_figures.exposed_share(run) == pytest.approx(0.05)


def test_the_simulator_is_held_against_the_same_requests() -> None:
    measured = part(Run(BASE.name, 0.5, "poisson", 0, (played(1.0), played(2.0, at_s=50.0))))
    costs = disagg_costs.fitted(disagg_costs.pooled([measured]), "here")
    assert costs.prefill_s_per_token == pytest.approx(COSTS.prefill_s_per_token)
    took = disagg_costs.predicted_s(measured, costs, measured.runs[0], BASE, 28)
    half = part(Run(BASE.name, 0.5, "poisson", 0, (played(took / 2), played(took / 2, at_s=50.0))))
    figures, rows = disagg_figures.simulation([half], 28)
    assert figures[0].estimate.median == pytest.approx(1.0)
    assert rows[0]["jct_simulated_s"] == pytest.approx(took)
    assert {row["part"] for row in rows} == {"simulated"}


def test_costs_come_from_what_the_workers_took() -> None:
    chunks = [
        Chunk(tokens, 0, count * 0.005 + tokens * 0.001 + tokens**2 / 2 * 1e-7, count)
        for tokens, count in ((128, 1), (512, 1), (1536, 3))
    ]
    steps = [Step(rows, rows * 100, 0.02 + rows * 0.002 + rows * 1e-4) for rows in (1, 2, 4)]
    one = Measured(chunks, steps, 1000.0, 0.0, 0.004)
    found = disagg_costs.fitted({"bf16": one, "k2v2": one._replace(bytes_per_token=160.0)}, "here")
    assert (found.chunk_s, found.prefill_s_per_token) == pytest.approx((0.005, 0.001))
    assert found.step_time_s("k2v2", 2, 200) == pytest.approx(steps[1].took_s)
    assert found.sent_bytes("k2v2", 300) == 256 * 160.0 + (300 - 256) * 1000.0


def test_a_parts_bad_minute_changes_no_cost_where_others_measured_the_same() -> None:
    three = [part(), part(), part()]
    bad = three[1].measured["bf16"]
    bad.chunks[0] = bad.chunks[0]._replace(took_s=99.0)
    found = disagg_costs.pooled(three)
    assert found == three[0].measured
    alone = disagg_costs.pooled([three[1]])
    assert alone["bf16"].chunks[0].took_s == 99.0
    longer = part()
    longer.measured["bf16"].chunks.append(Chunk(2560, 0, 3.0, 5))
    assert len(disagg_costs.pooled([*three, longer])["bf16"].chunks) == 5


@pytest.mark.parametrize(
    ("form", "most"), [("plain", 1.01), ("fp8", 0.51), ("kvquant", 0.2), ("cachegen", 0.3)]
)
def test_forms_for_the_link_come_back_as_16_bit_pages(form: str, most: float) -> None:
    sealer = FormSealer(SHAPE)
    context = SealContext(f"{form}.3", PageTag("s"), b"c" * 32, b"m", b"d")
    tiles = [pack_float_tiles(*normal_page(SHAPE, seed), Layout.BF16) for seed in range(3)]
    page = b"".join(one.tobytes() for one in tiles)
    sizes = tuple(one.nbytes for one in tiles)
    frame = sealer.seal(context, page, sizes)
    assert len(frame) <= most * len(page)
    back = layers_of(sealer.open(context, memoryview(bytes(frame)), sizes), sizes)
    assert [len(one) for one in back] == list(sizes)
    if form == "plain":
        assert b"".join(back) == page
        return
    for sent, got in zip(tiles, back, strict=True):
        values = np.frombuffer(bytearray(got), np.uint8).reshape(sent.shape)
        (k, _), (k_back, _) = (unpack_float_tiles(one, SHAPE) for one in (sent, values))
        assert (k - k_back).float().abs().mean() < 0.5 * k.float().abs().mean()
    changed = bytearray(frame)
    changed[-1] ^= 1
    with pytest.raises(SealError):
        list(sealer.open(context, memoryview(changed), sizes))


def test_parts_are_named_by_trace_link_and_helping() -> None:
    assert len(part_names()) == len(TRACES) * 3
    assert part_of("azure_code-25.2") == ("azure_code", 25, 2)
    assert disagg.parts_of(Options(only=("costs",))) == []
    assert disagg.parts_of(Options(quick=True)) == ["uniform_short-42"]
    for name in ("azure_code", "azure_code-11", "azure_code-25.x", "nobody-25"):
        with pytest.raises(ConfigError, match=r"only: .*azure_code-10"):
            disagg.parts_of(Options(only=(name,)))


def test_parts_are_kept_by_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = part(*turns(BASE.name, 0.95, 10.0))
    monkeypatch.setattr(harness, "commit", lambda: "abc")
    disagg_kept.keep("azure_conv-42", one, tmp_path)
    assert disagg_kept.kept("azure_conv-42", Part, tmp_path) == one
    assert disagg_kept.all_kept(tmp_path) == ["azure_conv-42"]
    monkeypatch.setattr(harness, "commit", lambda: "def-dirty")
    disagg_kept.keep("azure_conv-42", one, tmp_path)
    assert disagg_kept.kept("azure_conv-42", Part, tmp_path) is None


def test_every_form_has_its_costs() -> None:
    rows = {row["form"]: row for row in disagg_forms.cost_rows(1)}
    size = {name: float(row["bytes_per_token"] or 0) for name, row in rows.items()}
    assert size["bf16"] == 114_688
    assert size["k2v2"] / size["bf16"] < 0.157
    assert size["cachegen"] < size["fp8"] < 0.51 * size["bf16"]
    assert rows["k2v2"]["widen_us_per_token"] == 0.0
    assert all(float(rows[name]["widen_us_per_token"] or 0) > 0 for name in disagg_forms.FORMS)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_lanes_give_back_what_the_range_coder_does(layer: int) -> None:
    sample = [[normal_page(SHAPE, seed) for seed in (8, 9)]] * SHAPE.num_layers
    theirs, ours = CacheGen(sample), Interleaved(sample)
    k, v = normal_page(SHAPE, 1)
    k[:, 5] *= 100.0  # rare symbols
    place = Place(layer, first=False)
    wanted, coded = theirs.encode(k, v, place), ours.encode(k, v, place)
    for one, other in zip(
        theirs.decode(wanted, SHAPE, place), ours.decode(coded, SHAPE, place), strict=True
    ):
        assert torch.equal(one, other)
    states = 4 * 2 * SHAPE.num_kv_heads * SHAPE.head_dim
    assert abs(len(coded) - states - len(wanted)) < 0.02 * len(wanted) + states // 2


def test_time_in_which_nobody_waits_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[float, float]] = []

    async def answered(_: object, request: GenerateRequest, at_s: float) -> Played:
        sent.append((asyncio.get_running_loop().time(), at_s))
        await asyncio.sleep(0.01)
        return played(len(request.prompt_ids), at_s=at_s)

    class Nobody:
        async def set_tenants(self, tenants: dict[str, float]) -> None:
            assert tenants

    monkeypatch.setattr(disagg_workers, "answered", answered)
    monkeypatch.setattr(disagg_workers, "IDLE_S", 0.05)
    at_s = np.array([0.0, 0.1, 5000.0, 5000.2, 5000.21])
    load = Drawn(at_s, np.arange(1, 6), np.full(5, 2))
    workers = disagg_workers.Workers(Nobody())  # type: ignore[arg-type]
    found = asyncio.run(disagg_workers.play(workers, COLOCATED, load))
    assert [one.at_s for one in found] == at_s.tolist()
    assert [one.jct_s for one in found] == [1, 2, 3, 4, 5]
    waited = np.diff([when for when, _ in sent])
    assert (waited[[0, 1, 2]] >= 0.049).all(), "a pause, and no longer one than there was"
    assert waited.sum() < 60


def test_a_router_is_timed_on_workers_that_answer_at_once() -> None:
    figure, row = disagg_overhead.router_overhead(quick=True)
    assert figure.name == "router_overhead_ms_p99"
    median, late = row["router_ms_p50"], row["router_ms_p99"]
    assert isinstance(median, float)
    assert isinstance(late, float)
    assert 0 < median <= late
    assert row["requests"] == 100


def test_a_published_system_is_predicted_from_one_of_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(disagg_published, "REQUESTS", 200)
    figures, rows = disagg_published.published()
    simulated = [row for row in rows if row["part"] == "simulated"]
    base = [row for row in simulated if row["variant"] == "bf16"]
    for name in ("jct", "ttft"):
        own = f"{name}_error"
        assert base[0][own] == pytest.approx(0, abs=1e-3), "the fitted row"
        told = [float(row[own] or 0) for row in simulated if row[own] is not None]
        (worst,) = [one for one in figures if one.name == f"sim_error_published_{name}"]
        assert len(told) == 4, "the others are predicted"
        assert worst.estimate.median == max(told)
    for rate in (0.15, 0.3):
        times = [float(row["jct_simulated_s"] or 0) for row in base if row["rate"] == rate]
        assert times == sorted(times, reverse=True), "links grow faster"
    assert all("jct_s" not in row for row in simulated), "what others measured has its own rows"
