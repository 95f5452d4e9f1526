from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Generator

from kvkeep.models.loader import load
from kvkeep.ops import select
from tests.bench.dense import Dense
from tools.recall_model import __main__ as command
from tools.recall_model import data
from tools.recall_model.train import GateError, Plan, Recaller, Stage, Trainer, scores, shape

TINY = shape(16, 500.0, 256)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gen() -> Generator:
    return Generator().manual_seed(3)


@pytest.mark.parametrize("kind", ["repeated", "pairs", "shots", "spans"])
def test_what_is_asked_for_stands_in_the_row_and_follows_the_question(kind: str) -> None:
    batch = data.drawn(gen(), kind, 16, 128)
    assert batch.ids.shape == batch.labels.shape == (16, 128)
    assert int(batch.ids.min()) > 0
    assert int(batch.ids.max()) < data.VOCAB
    rows, at = torch.nonzero(batch.labels != data.NOTHING, as_tuple=True)
    assert len(rows) >= 16
    told = 0
    for row, place in zip(rows.tolist(), at.tolist(), strict=True):
        ids, label = batch.ids[row].tolist(), int(batch.labels[row, place])
        if place + 1 < 128:
            assert ids[place + 1] == label, "the row goes on with the right token"
        before = [i for i in range(place) if ids[i] == ids[place]]
        told += any(ids[i + 1] == label for i in before)
    unseen = 16 if kind == "repeated" else 0
    assert told >= len(rows) - unseen, "and has said so before, but where a period ends first"


def test_pairs_stand_in_the_first_part_and_some_rows_have_them_early() -> None:
    batch = data.pairs(gen(), 64, 256, count=6)
    keys = (batch.ids[:, :192] >= data.FIRST_KEY) & (batch.ids[:, :192] < data.FIRST_VALUE)
    assert keys.sum(1).tolist() == [6] * 64
    centres = (keys * torch.arange(192)).sum(1) / 6
    assert int((centres < 60).sum()) > 10
    assert int((centres > 80).sum()) > 10


def test_rows_follow_from_the_generator() -> None:
    for kind in ("repeated", "pairs", "shots", "spans"):
        one, two = (data.drawn(gen(), kind, 4, 64) for _ in range(2))
        assert torch.equal(one.ids, two.ids)


def plan() -> Plan:
    stages = (
        Stage(("repeated",), 16, 0.0, 40, 128, hinted=True),
        Stage(("pairs", "spans", "shots"), 64, 0.0, 6, 128, fixed=True),
    )
    return Plan(TINY, stages, rate=1e-3)


def test_an_interrupted_run_ends_where_the_other_does(tmp_path: Path) -> None:
    whole, parts = Trainer(plan(), tmp_path / "a"), Trainer(plan(), tmp_path / "b")
    assert whole.run()
    assert not parts.run(stop_at_step=33)
    again = Trainer(plan(), tmp_path / "b")
    assert again.progress.step == 33
    assert again.run()
    for a, b in zip(whole.net.parameters(), again.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.progress.stage == 2


def test_a_gate_that_is_missed_ends_the_run(tmp_path: Path) -> None:
    missed = Plan(TINY, (Stage(("repeated",), 16, 1.1, 3),))
    with pytest.raises(GateError, match=r"stage 0 reached .* try another --seed"):
        Trainer(missed, tmp_path).run()


def test_the_checkpoint_is_the_network(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = Recaller(TINY).to(torch.bfloat16).float()
    command.export(net, tmp_path / "model")
    model = load(tmp_path / "model", dtype="float32", ops=select("reference", 1))
    ids = torch.randint(1, data.VOCAB, (40,), generator=gen())
    got = model.forward(ids, torch.arange(40), Dense(), None)
    assert torch.allclose(got, net.logits(net.hidden(ids[None]))[0], atol=1e-4)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    assert config["eos_token_id"] is None


def test_scores_are_of_rows_never_trained_on_and_chance_without_training() -> None:
    torch.manual_seed(1)
    found = scores(Recaller(TINY), 64, seed=0)
    assert set(found) == {"pairs", "spans", "shots"}
    assert max(found.values()) < 0.2
