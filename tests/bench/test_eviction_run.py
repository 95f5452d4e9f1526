"""Branches over one cache answer as a plain model does; outcomes and losses add up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench import eviction, eviction_choose, eviction_suite, eviction_tally
from bench.eviction_choose import Chosen
from bench.eviction_policies import ONCE, TWICE, Masks, Seen, everything
from bench.eviction_reader import AGAIN, Cache, Reader
from bench.eviction_run import Outcome, after, before
from bench.eviction_tally import (
    RECALL_MODELS,
    Tally,
    World,
    gathered,
    loss_of,
    margin,
    refuse_unable,
    removed_of,
    task_rows,
    weights_of,
    worlds,
)
from bench.harness import Options
from bench.quality_run import Item
from bench.quality_suite import Context, Probe, digest
from kvkeep.config import DEMO_MODEL
from kvkeep.errors import ConfigError
from kvkeep.eviction.corm import PRESETS
from kvkeep.models.host import HostedModel
from kvkeep.models.loader import load
from kvkeep.models.text import TextModel
from kvkeep.ops import select
from tests.bench.dense import Dense

IDS = tuple(torch.randint(1, 200, (150,), generator=torch.Generator().manual_seed(5)).tolist())
PROBES = (
    Probe(task="a", ids=(7, 8, 9), copied=(1, 2, 3)),
    Probe(task="a", ids=(9, 8, 7), copied=(4, 5, 6)),
    Probe(task="b", ids=(3,), copied=(4,)),
)


@pytest.fixture(scope="module")
def model(tiny: dict[str, Path]) -> HostedModel:
    return load(tiny["llama"], dtype="float32", ops=select("reference", 1))


@pytest.fixture(scope="module")
def reader(model: HostedModel, tiny: dict[str, Path]) -> Reader:
    return Reader(model, eviction_tally.theta_of(tiny["llama"]))


def half(seen: Seen) -> torch.Tensor:
    """Keep at random, each head something else."""
    live = torch.rand(seen.keys.shape[:3], generator=torch.Generator().manual_seed(1)) < 0.5
    live[..., -1] = True
    return live


POLICIES: dict[str, Masks] = {"full": everything, "half": half}


def said(
    model: HostedModel, ids: tuple[int, ...], live: torch.Tensor, asked: tuple[int, ...]
) -> tuple[int, ...]:
    """Return three greedy tokens after a question, by a plain cache."""
    kv = Dense()
    model.forward(torch.tensor(ids), torch.arange(len(ids)), kv, torch.tensor([0]))
    kv.live = live
    told: list[int] = []
    fresh, at = torch.tensor(asked), len(ids)
    for _ in range(3):
        logits = model.forward(
            fresh, torch.arange(at, at + len(fresh)), kv, torch.tensor([len(fresh) - 1])
        )
        at += len(fresh)
        fresh = logits[0].argmax()[None]
        told.append(int(fresh))
    return tuple(told)


def test_branches_say_what_a_plain_cache_with_the_same_masks_says(
    model: HostedModel, reader: Reader
) -> None:
    cache, seen = reader.see(IDS)
    live = torch.stack([rule(seen) for rule in POLICIES.values()])
    expected = [[said(model, IDS, own, probe.ids) for probe in PROBES[:2]] for own in live]
    assert expected[0] != expected[1]
    asked = [
        [Probe(task="a", ids=p.ids, copied=right) for p, right in zip(PROBES[:2], own, strict=True)]
        for own in expected
    ]
    for own, probes in enumerate(asked):
        scores = reader.ask(cache, live, probes, [p.ids for p in probes])
        assert scores[own] == [1.0, 1.0]
        assert scores[1 - own] != [1.0, 1.0]


def test_only_who_would_say_something_else_goes_on_alone(
    model: HostedModel, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, seen = reader.see(IDS)
    live = torch.stack([everything(seen), half(seen), everything(seen)])
    told = said(model, IDS, live[0], PROBES[0].ids)
    probe = Probe(task="a", ids=PROBES[0].ids, copied=told)
    asked: list[int] = []
    greedy = Reader._greedy

    def counted(self: Reader, cache: Cache, live: torch.Tensor, ids: object, steps: int) -> object:
        asked.append(len(live))
        return greedy(self, cache, live, ids, steps)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "_greedy", counted)
    scores = reader.ask(cache, live, [probe], [probe.ids])
    assert scores[0] == scores[2] == [1.0]
    assert scores[1] != [1.0]
    assert asked == [1, 1], "the first, and the one that differs"


def test_what_was_seen_does_not_depend_on_how_a_prompt_was_cut(reader: Reader) -> None:
    _, whole = reader.see(IDS)
    cache, part = reader.see(IDS[:90])
    _, joined = reader.see_more(cache, part, IDS[90:])
    for name in ("weights", "sums", "keys", "value_norms"):
        assert torch.allclose(getattr(joined, name), getattr(whole, name), atol=1e-4), name
    assert torch.allclose(joined.queries.mean, whole.queries.mean, atol=1e-4)
    assert joined.weights.shape[1] == len(IDS)
    assert torch.allclose(whole.weights.sum(-1), torch.ones(()), atol=1e-4)


def test_queries_are_turned_back(tiny: dict[str, Path]) -> None:
    """The same token at every place has the same query before it is turned."""
    model = load(tiny["qwen2"], dtype="float32", ops=select("reference", 1))
    _, seen = Reader(model, eviction_tally.theta_of(tiny["qwen2"])).see((17,) * 40)
    first = seen.queries.covariance[0].diagonal(dim1=1, dim2=2)
    assert float(first.abs().max()) < 1e-4
    assert float(seen.queries.mean[0].abs().max()) > 1e-2


def test_a_second_reading_sees_all_of_the_first(reader: Reader) -> None:
    _, once = reader.see(IDS)
    assert once.repeat is None
    _, twice = reader.see(IDS, twice=True)
    assert twice.repeat is not None
    assert twice.repeat_share is not None
    assert len(IDS) > AGAIN, "in two parts"
    assert torch.equal(twice.weights, once.weights)
    assert (twice.repeat > 0).all()
    ratio = twice.repeat_share / twice.repeat
    assert float(ratio.min()) > len(IDS)
    assert float(ratio.max()) <= len(IDS) + AGAIN + 8


def test_outcomes_count_rows_after_the_prompt(reader: Reader) -> None:
    context = Context(kind="x", ids=IDS, probes=PROBES)
    found = list(after(reader, [context], POLICIES, twice=False))
    assert [one.policy for one in found] == ["full", "half"]
    assert [item.task for item in found[0].items] == ["a", "a", "b"]
    rows, tokens = [3 + 2, 3 + 2, 1], len(IDS)
    more = sum(n * (n + 1) / 2 for n in rows)
    assert found[0].seen_tokens == found[0].live_tokens == tokens * sum(rows) + more
    kept = float(found[1].kept.mean())
    assert found[1].live_tokens == pytest.approx(kept * tokens * sum(rows) + more)
    assert found[0].prompt_tokens == 3 * tokens * (tokens + 1) / 2


def test_questions_in_the_prompt_leave_out_answers_of_one_token(reader: Reader) -> None:
    context = Context(kind="x", ids=IDS, probes=PROBES * 2)
    found = list(before(reader, [context], POLICIES, twice=True))
    assert [one.policy for one in found] == ["full", "half"] * 2
    assert all(item.task == "a" for one in found for item in one.items)
    assert found[0].seen_tokens == 2 * (len(IDS) + 3) + 3


def test_an_answers_first_token_does_not_count_where_it_saw_everything(
    model: HostedModel, reader: Reader
) -> None:
    whole = (*IDS, 7, 8, 9)
    cache, seen = reader.see(whole)
    live = torch.stack([everything(seen), half(seen)])
    first = int(seen.logits.argmax())
    told = [said(model, whole, own, (first,))[:2] for own in live]
    for own, rest in enumerate(told):
        probe = Probe(task="a", ids=(7, 8, 9), copied=(-1, *rest))
        assert reader.go_on(cache, live, probe, first)[own] == 1.0


def tally(scores: list[float], rows: list[tuple[float, float, float]]) -> dict[str, Tally]:
    items = [Item("m/t", i, score) for i, score in enumerate(scores)]
    return {"m": Tally(items, [torch.full((1, 1), 0.25)] * len(scores), rows)}


def test_losses_removals_and_margins_add_up() -> None:
    found = {
        "full": tally([1.0] * 20, [(10, 10, 90)] * 20),
        "ours": tally([1.0] * 19 + [0.0], [(2, 10, 90)] * 20),
        "other": tally([1.0] * 16 + [0.0] * 4, [(4, 10, 90)] * 20),
    }
    assert loss_of(found, "ours").median == pytest.approx(0.05)
    assert loss_of(found, "ours").high > 0.1
    assert removed_of(found, "ours")[:3] == pytest.approx((0.8, 0.8, 0.8))
    assert removed_of(found, "ours", prompts_too=True).median == pytest.approx(0.08)
    gained = margin(found, "ours", "other")
    assert gained.median == pytest.approx(0.15)
    assert gained.low >= 0, "paired: whoever fails under ours fails under the other"
    assert margin(found, "other", "ours").median == pytest.approx(-0.15)


def test_tasks_weigh_the_same_within_a_model_and_models_among_each_other() -> None:
    items = [Item(name, 0, 1.0) for name in ("a/x", "a/y", "b/x", "a/x")]
    assert weights_of(items) == {"a/x": 0.5, "a/y": 0.5, "b/x": 1.0}


def test_a_task_that_a_recall_model_cannot_do_is_left_out_for_all() -> None:
    found = {"full": tally([1.0] * 97 + [0.0] * 3, []), "ours": tally([1.0] * 100, [])}
    whole = refuse_unable(found, ["m"])
    assert not found["full"]["m"].items
    assert not found["ours"]["m"].items
    assert len(whole["full"]["m"].items) == len(whole["ours"]["m"].items) == 100
    row = next(task_rows("after", "ours", whole, found))
    assert (row["judged"], row["items"]) == (False, 100)
    able = {"full": tally([1.0] * 98 + [0.0] * 2, []), "ours": tally([0.0] * 100, [])}
    refuse_unable(able, ["m"])
    assert len(able["ours"]["m"].items) == 100


def test_the_suite_is_the_one_that_was_committed() -> None:
    suite = eviction_suite.read()
    assert dict(eviction_suite.held_out(suite)) == suite.digests
    held = eviction_suite.of_recall(suite)
    seeds = (*suite.held_out, *suite.development)
    assert len(set(seeds)) == len(seeds)
    made = [eviction_suite.of_recall(suite, reseed=seed, quick=True) for seed in seeds]
    ids = [context.ids for contexts in made for context in contexts]
    assert len(set(ids)) == len(ids), "no context comes twice, and none that is held out"
    quick = made[0]
    assert digest(quick) != suite.digests["recall"]
    assert all(context in held for context in quick)
    for context in held:
        for probe in context.probes:
            lead = probe.ids[-1]
            at = max(i for i, token in enumerate(context.ids) if token == lead)
            told = context.ids[at + 1 : at + 1 + len(probe.copied)]
            assert told == probe.copied, "the answer stands behind the question's last token"


def test_later_turns_are_questions_and_go_on_from_the_first() -> None:
    text = TextModel.load(DEMO_MODEL)
    suite = eviction_suite.read()
    found = eviction_suite.of_text(suite, text, 2048, reseed=suite.development[0], quick=True)
    assert {probe.task for context in found for probe in context.probes} == {
        "recall", "few_shot", "table", "copy", "turns"
    }  # fmt: skip
    turns = next(context for context in found if context.kind == "turns")
    whole = text.decode((*turns.ids, *turns.probes[0].ids), skip_special_tokens=False)
    assert whole.count("<|user|>") == 2
    assert whole.endswith("<|assistant|>")
    assert turns.probes[0].answer in whole


def test_choices_name_rules_and_variants_that_exist() -> None:
    for protocol, chosen in eviction_choose.read().items():
        assert protocol in {"after", "before"}
        assert chosen.rule in eviction_choose.RULES[protocol]
        assert chosen.repeat in eviction_choose.REPEAT_RULES[protocol]
        for name, variants in {**ONCE, **TWICE}.items():
            assert chosen.variants[name] in variants


def test_the_preset_is_what_was_chosen() -> None:
    own = PRESETS["corm"]
    rule = f"rows={own.prompt_rows} c={own.weight:g} spread={own.spread}"
    assert eviction_choose.read()["before"].rule == rule


def test_recall_models_are_committed_with_what_they_reach() -> None:
    assert RECALL_MODELS
    for path in RECALL_MODELS:
        assert (path / "scores.json").exists()
        assert load(path, ops=select("reference", 1)).spec.num_layers == 2


def test_a_loss_out_of_bounds_removes_nothing() -> None:
    chosen = Chosen(rule="", repeat="", ours="corm", variants={})
    found = {
        "full": tally([1.0] * 20, [(10, 10, 90)] * 20),
        "corm": tally([1.0] * 10 + [0.0] * 10, [(1, 10, 90)] * 20),
    }
    removed, lost = eviction.figures_of("after", chosen.ours, found)
    assert removed.name == "removed_at_1pct_loss_agnostic"
    assert removed.estimate.median == pytest.approx(0.9)
    assert removed.estimate.low == 0
    assert removed.row()["status"] == "not shown"
    assert lost.row()["status"] == "missed"


def test_a_protocol_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="only: there is no protocol 'later'"):
        eviction.measure(Options(only=("later",)))


def test_a_model_of_ones_own_is_measured_alone(tiny: dict[str, Path]) -> None:
    (own,) = worlds(select("reference", 1), tiny["llama"])
    assert own.name == "given"
    assert not own.gated
    assert math.isfinite(eviction_tally.theta_of(tiny["llama"]))


def test_outcomes_are_gathered_by_policy_and_model(reader: Reader) -> None:
    contexts = [Context(kind="x", ids=IDS[:60], probes=PROBES)] * 2
    world = World("m", reader, lambda _reseed, _quick: contexts)
    found = gathered("after", [world], POLICIES, seeds=(1,), quick=False, twice=False)
    assert set(found) == {"full", "half"}
    assert len(found["half"]["m"].items) == 6
    assert {item.task for item in found["half"]["m"].items} == {"m/a", "m/b"}
    assert isinstance(found["half"]["m"].heads[0], torch.Tensor)
    assert Outcome._fields[0] == "policy"
