from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from bench import harness, quality, quality_kept, quality_stats, quality_suite
from bench.harness import Options
from bench.quality_kept import answered
from bench.quality_late import Late
from bench.quality_run import Asked, Item, Machine, greedy, recorded, run
from bench.quality_suite import Context, Maker, Probe, digest, read, right
from kvkeep.config import DEMO_MODEL
from kvkeep.errors import ConfigError
from kvkeep.eviction.corm import PRESETS, Corm
from kvkeep.models.text import TextModel
from kvkeep.ops.codes import SINK_TOKENS
from kvkeep.quant.baselines.base import Dequantised, Stored
from kvkeep.quant.baselines.kivi import Kivi
from kvkeep.quant.codec import Float, unpack_float_tiles
from kvkeep.quant.hack import Hack
from kvkeep.types import Layout


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(read(), TextModel.load(DEMO_MODEL), 2048)


@pytest.fixture(scope="module")
def contexts(maker: Maker) -> list[Context]:
    return maker.contexts()


def test_the_suite_is_the_one_that_was_committed(contexts: list[Context]) -> None:
    suite = read()
    assert digest(contexts) == suite.digest
    tasks = [probe.task for context in contexts for probe in context.probes]
    count = len(tasks) + sum(max(0, len(c.turns) - 1) for c in contexts)
    count += sum(len(c.ids) // quality_suite.BLOCK for c in contexts if c.kind == "text")
    assert count >= 5000
    assert {*tasks, "chat", "text"} == set(suite.weights) == set(quality_suite.TASKS)
    assert max(len(c.ids) for c in contexts) < 2048


def test_the_quick_suite_is_a_part_of_the_whole(maker: Maker, contexts: list[Context]) -> None:
    quick = maker.contexts(quick=True)
    assert all(context in contexts for context in quick)
    assert 0 < len(quick) < len(contexts) / 10


def test_another_seed_makes_other_contexts_of_the_same_text(maker: Maker) -> None:
    other = Maker(read(), TextModel.load(DEMO_MODEL), 2048, reseed=1).contexts(quick=True)
    same = [a == b for a, b in zip(maker.contexts(quick=True), other, strict=True)]
    assert same.count(True) == sum(part.quick for part in read().parts if part.kind == "text")


@pytest.mark.parametrize(
    ("said", "score"),
    [(" 4821.", 1.0), ("4821", 1.0), ("48215", 0.0), ("4820", 0.0), ("It is 4821", 0.0), ("", 0.0)],
)
def test_an_answer_is_right_as_a_whole(said: str, score: float) -> None:
    assert right(Probe(task="recall", ids=(1,), answer="4821"), said, ()) == score


def test_copied_tokens_count_one_by_one() -> None:
    probe = Probe(task="copy", ids=(1,), copied=(5, 6, 7, 8))
    assert right(probe, "", (5, 6, 9, 8)) == 0.75
    assert right(probe, "", (5,)) == 0.25


def items(task: str, scores: Sequence[float], each: int = 2) -> list[Item]:
    return [Item(task, i // each, score) for i, score in enumerate(scores)]


def test_a_loss_is_a_share_of_the_models_own_score() -> None:
    plain = items("recall", [1, 1, 1, 0] * 10)
    coded = items("recall", [1, 1, 0, 0] * 10)
    found = quality_stats.overall(plain, coded, {"recall": 2.0})
    assert found.median == pytest.approx(1 / 3)
    assert found.low < 1 / 3 < found.high
    assert found.samples == 40
    assert quality_stats.changed(plain, coded, "recall") == (10, 0)


def test_a_model_that_cannot_do_a_task_loses_nothing_of_it() -> None:
    plain, coded = items("copy", [0.0] * 8), items("copy", [0.0] * 7 + [1.0])
    assert quality_stats.overall(plain, coded, {"copy": 1.0}) == (0, 0, 0, 8)


def test_texts_loss_is_of_the_likelihood_of_a_token() -> None:
    plain, coded = items("text", [3.0] * 8), items("text", [3.1] * 8)
    found = quality_stats.overall(plain, coded, {"text": 1.0})
    assert found.median == found.low == pytest.approx(1 - np.exp(-0.1))
    assert quality_stats.row("c", "text", plain, coded)["worse"] == 8


def test_a_mean_over_tasks_takes_their_weights() -> None:
    plain = items("recall", [1.0] * 4) + items("copy", [1.0] * 4)
    coded = items("recall", [1.0] * 4) + items("copy", [0.5] * 4)
    weights = {"recall": 3.0, "copy": 1.0}
    assert quality_stats.overall(plain, coded, weights).median == pytest.approx(0.125)


def test_two_codecs_are_compared_on_the_same_draws() -> None:
    """Contexts that are hard for both widen no margin between them."""
    plain = items("recall", [1.0] * 40)
    ours, other = (
        quality_stats.drawn(plain, items("recall", scores * 10), {"recall": 1.0})
        for scores in ([0.1, 0.1, 0.9, 0.9], [0.05, 0.05, 0.85, 0.85])
    )
    alone = quality_stats.estimate(ours, 40)
    assert alone.low + 0.1 < alone.median < alone.high - 0.1
    found = quality_stats.apart(other, ours, 40)
    assert tuple(found) == pytest.approx((0.05, 0.05, 0.05, 40))
    (margin,) = quality.margins({"k2v2": ours, "kivi2": other, "cachegen": other}, 40)
    assert (margin.name, margin.estimate) == ("quality_loss_kivi2_over_k2v2", found)
    assert margin.row()["status"] == "shown"


def test_sides_that_answered_different_items_are_refused() -> None:
    with pytest.raises(ValueError, match="different items"):
        quality_stats.by_task(items("recall", [1.0]), items("copy", [1.0]))


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'k9'; there are: k2v2"):
        quality.chosen(Options(only=("k9",)))
    assert quality.chosen(Options(quick=True)) == quality.QUICK
    assert set(quality.QUICK) < set(quality.chosen(Options()))
    assert quality.chosen(Options(only=("calibrated",))) == ("calibrated",)
    with pytest.raises(ConfigError, match="run `kvkeep model calibrate` first"):
        quality.made("calibrated", (), DEMO_MODEL)


def shorter(context: Context) -> Context:
    """Return some of a context: a few of its questions, half of a text."""
    probes, text = context.probes, context.kind == "text"
    ids = context.ids[:512] if text else context.ids
    return msgspec.structs.replace(
        context, ids=ids, probes=(*probes[:3], *probes[-2:]), turns=context.turns[:3]
    )


def test_an_engine_answers_every_item_and_a_codec_changes_some(maker: Maker) -> None:
    kinds = {c.kind: shorter(c) for c in reversed(maker.contexts(quick=True))}
    machine, contexts = Machine(DEMO_MODEL, 1, 1 << 26), list(kinds.values())
    codec = Dequantised(Kivi())
    plain, coded = (run(Asked(machine, one), contexts) for one in (Float(), codec))
    assert {item.task for item in plain} == set(quality_suite.TASKS)
    assert np.mean([item.score for item in plain if item.task == "recall"]) > 0.8
    assert [(a.task, a.context) for a in plain] == [(b.task, b.context) for b in coded]
    assert plain != coded
    assert codec.stored_bytes / codec.float_bytes == pytest.approx(3 / 16)


def test_a_run_in_pieces_is_the_whole_run_and_ended_pieces_are_kept(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = [shorter(c) for c in maker.contexts(quick=True) if c.kind in {"facts", "text"}][:5]
    machine, corm = Machine(DEMO_MODEL, 1, 1 << 26), Corm(PRESETS["corm"])
    commit = ["a" * 40]
    monkeypatch.setattr(harness, "commit", lambda: commit[0])
    whole = answered("k4v2", machine, contexts, Hack(Layout.K4V2), corm, None)
    monkeypatch.setattr(quality_kept, "CONTEXTS", 2)
    made, piece = list[int](), quality_kept.Run.piece

    def counted(own: quality_kept.Run, some: list[Context], first: int) -> quality_kept.Piece:
        made.append(first)
        return piece(own, some, first)

    monkeypatch.setattr(quality_kept.Run, "piece", counted)
    first, second = (
        answered("k4v2", machine, contexts, Hack(Layout.K4V2), corm, tmp_path) for _ in range(2)
    )
    assert made == [0, 2, 4]
    assert first == second
    assert first.items == whole.items
    assert (first.bytes_ratio, first.kept) == (whole.bytes_ratio, whole.kept)
    assert 0 < first.kept < 1
    assert {item.context for item in first.items} == set(range(5))
    commit[0] = "b" * 40
    answered("k4v2", machine, contexts[:1], Hack(Layout.K4V2), corm, tmp_path)
    assert made[3:] == [0]


def test_attending_codes_scores_like_attending_what_they_stand_for(maker: Maker) -> None:
    """They differ by the rounding of queries and weights to eight bits alone."""
    contexts = [shorter(c) for c in maker.contexts(quick=True) if c.kind == "text"]
    machine, codec = Machine(DEMO_MODEL, 1, 1 << 26), Hack(Layout.K2V2)
    plain, native, widened = (
        np.array([item.score for item in run(Asked(machine, one), contexts)])
        for one in (Float(), codec, Dequantised(Stored(codec)))
    )
    apart = np.abs(native - widened).mean()
    assert 0 < apart < 0.3 * np.abs(widened - plain).mean()
    assert abs(native.mean() - widened.mean()) < 0.01


def levels(keys: torch.Tensor) -> int:
    """Return the most different values [S, D] that a channel has."""
    return max(len(channel.unique()) for channel in keys.T)


def test_a_prompt_that_is_coded_late_is_computed_in_16_bits_and_attended_as_codes(
    maker: Maker,
) -> None:
    machine, hack = Machine(DEMO_MODEL, 1, 1 << 26), Hack(Layout.K2V2, rotate=False)
    text = [shorter(c) for c in maker.contexts(quick=True) if c.kind == "text"]
    plain, early, late = (
        [item.score for item in run(Asked(machine, one), text)]
        for one in (Float(), Dequantised(Stored(hack)), Late(Stored(hack)))
    )
    assert late == plain != early
    (context,) = [c for c in maker.contexts(quick=True) if c.probes][:1]
    codec = Late(Stored(hack))
    asked = Asked(machine, codec)
    asked.answer([("a", context.ids)], greedy(4))
    pages = len(context.ids) // 128 * 2
    shape, counts = asked.shape, []
    for slot in map(int, np.flatnonzero(asked.pool.tile_table[:, 0, 0] >= 0)):
        k, _ = unpack_float_tiles(asked.pool.read_tiles(slot, 0), shape)
        counts.append(levels(k[0, SINK_TOKENS:]))
    assert sorted(counts)[:pages] == [4] * pages
    assert codec.stored_bytes / codec.float_bytes < 0.17


def test_pages_are_recorded_by_layer() -> None:
    machine = Machine(DEMO_MODEL, 1, 1 << 26)
    contexts = [Context(kind="facts", ids=tuple(range(5, 5 + 70 * n))) for n in (1, 2)]
    pages = recorded(machine, contexts, 4)
    assert [len(layer) for layer in pages] == [3] * 4
    first = [layer[0][0] for layer in pages]
    assert first[0].shape == (2, 64, 64)
    assert not any(torch.equal(first[0], other) for other in first[1:])
