from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tools.demo_model import checkpoint, data, tokenizer, words
from tools.demo_model.evaluate import answer_spans, messages_of
from tools.demo_model.model import Shape, spread_rows
from tools.demo_model.samples import Batch, Corpus, Quiz, Sampler, StageBatches, copy_order
from tools.demo_model.stages import KINDS, STAGES, Part, Stage
from tools.demo_model.train import GateError, Plan, Progress, Trainer, learning_rate

TEXTS = [
    f"Return item number {i} of the given list. Raise an error if the list has no such item. "
    f"The list itself is left as it was, and nothing is printed to the standard output."
    for i in range(60)
]
SHAPE = Shape(vocab=512, hidden=32, layers=1, heads=2, kv_heads=1, inner=32, head_dim=16)
EVERY_KIND = dict.fromkeys(KINDS, 1.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks here are too small to share
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer.build(TEXTS, seed=0, vocab=512)


@pytest.fixture(scope="module")
def corpus(tok: Tokenizer) -> Corpus:
    return Corpus(tok, TEXTS)


def tiny_plan(stages: tuple[Stage, ...]) -> Plan:
    return Plan(stages, SHAPE, warm_up=4, compiled=False, save_every=3, log_every=1, workers=0)


def two_stages() -> tuple[Stage, ...]:
    first = Part(32, 128, {"copy": 1.0}, copy_vocab=64, copy_smallest=64)
    second = Part(64, 256, EVERY_KIND, copy_vocab=512)
    return (
        Stage("copy", (first,), {"copy": 0.0}, 10_000, least_steps=3),
        Stage("all", (second, replace(second, length=32)), {}, 256 * 6, fixed=True),
    )


def words_of(rng: random.Random, held_out: bool) -> set[str]:
    facts = data.distinct_facts(rng, 100, held_out)
    rows = data.table_rows(rng, 20, held_out)
    codes = {data.code(rng, held_out) for _ in range(100)}
    return {f.identity for f in facts} | set(rows) | codes


def test_held_out_entities_keys_and_codes_are_never_trained_on() -> None:
    rng = random.Random(5)
    trained = set().union(*(words_of(rng, held_out=False) for _ in range(20)))
    held = set().union(*(words_of(rng, held_out=True) for _ in range(20)))
    assert len(trained) > 1000
    assert len(held) > 500
    assert not trained & held


def test_every_stated_code_is_on_the_side_asked_for() -> None:
    rng = random.Random(6)
    for held_out in (False, True):
        for make in (data.recall_text, data.chat_turns):
            made = make(rng, 6, data.no_filler, held_out)
            pieces = data.render(made) if isinstance(made[0], data.Turn) else made
            text = "".join(p.text for p in pieces)
            codes = re.findall(r"\b\d{4}\b", text)
            assert all(data.is_held_out("code" + c) == held_out for c in codes)


def test_table_has_forty_key_words_and_all_can_be_asked() -> None:
    assert len(set(words.KEYS)) == len(words.KEYS) == 40
    rows = data.table_rows(random.Random(1), 100, held_out=True)
    assert len(rows) == 100


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_length_asked_for(corpus: Corpus, kind: str) -> None:
    for seed in range(20):
        sample = Sampler(corpus, seed).sample(kind, Part(160, 160, EVERY_KIND, (2, 6), 512))
        assert sample.ids.shape == sample.weights.shape == (161,)
        assert sample.weights.any()


def test_answers_carry_the_answer_weight(corpus: Corpus, tok: Tokenizer) -> None:
    for seed in range(20):
        row = Sampler(corpus, seed).chat(400, Quiz((4, 6)))
        said = [tok.decode(row.ids[a:b].tolist(), False) for a, b in answer_spans(row.weights)]
        talk = messages_of(tok.decode(row.ids.tolist(), False))
        told = [m["content"] + data.END for m in talk if m["role"] == "assistant"]
        assert len(said) >= 2
        assert said == [t for t in told if not t.startswith(("Hello", "I am"))]


def test_every_answer_is_in_the_context(corpus: Corpus, tok: Tokenizer) -> None:
    for seed in range(20):
        row = Sampler(corpus, seed).recall(400, Quiz((4, 6)))
        for first, last in answer_spans(row.weights):
            answer = tok.decode(row.ids[first:last].tolist())
            assert answer + "." in tok.decode(row.ids[:first].tolist())


def test_chat_template_renders_what_was_trained_and_is_prefix_stable(
    corpus: Corpus, tok: Tokenizer
) -> None:
    fast = checkpoint.wrap(tok, 4096)
    for seed in range(10):
        row = Sampler(corpus, seed).chat(400, Quiz((4, 6)))
        talk = messages_of(tok.decode(row.ids.tolist(), False))
        ids = fast.apply_chat_template(talk, return_dict=False)
        assert ids == row.ids[: len(ids)].tolist()
        for n, message in enumerate(talk):
            if message["role"] == "assistant":
                asked = fast.apply_chat_template(
                    talk[:n], add_generation_prompt=True, return_dict=False
                )
                assert asked == ids[: len(asked)]
                assert ids[len(asked)] not in range(5)
    spaced = [{"role": "user", "content": " a \n"}]
    assert fast.apply_chat_template(spaced, tokenize=False) == "<|user|> a \n<|end|>"


def test_digits_are_single_tokens(tok: Tokenizer) -> None:
    assert tok.encode("in 48213").tokens[-5:] == ["4", "8", "2", "1", "3"]
    assert tok.encode("".join(data.SPECIALS)).ids == list(range(len(data.SPECIALS)))


def test_batches_depend_on_seed_stage_and_index_alone(corpus: Corpus) -> None:
    stage = two_stages()[1]
    batches = StageBatches(corpus, stage, 1, seed=0)
    later, first = batches[3], batches[0]
    same = StageBatches(corpus, stage, 1, seed=0)[3]
    assert all(torch.equal(a, b) for a, b in zip(later, same))
    assert not torch.equal(first.ids, StageBatches(corpus, stage, 1, seed=1)[0].ids)
    assert not torch.equal(first.ids, StageBatches(corpus, stage, 0, seed=0)[0].ids)
    assert not torch.equal(first.ids, batches[2].ids)


def test_resumed_run_equals_an_unbroken_one(corpus: Corpus, tmp_path: Path) -> None:
    plan = tiny_plan(two_stages())
    whole = Trainer(plan, corpus, tmp_path / "whole")
    broken = tmp_path / "broken"
    for folder in (whole.folder, broken):
        folder.mkdir()
    whole.run()
    assert whole.progress.stage == 2
    Trainer(plan, corpus, broken).run(stop_at_step=2)
    crashed = Trainer(plan, corpus, broken)
    crashed.run(stop_at_step=5)
    with (broken / "train.jsonl").open("a") as log:
        log.write(json.dumps({"step": 6}) + "\n")  # logged, but lost with the process
    resumed = Trainer(plan, corpus, broken)
    assert resumed.progress.step == 5
    resumed.run()
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name]), name
    steps = [json.loads(line)["step"] for line in resumed.log_file.read_text().splitlines()]
    assert steps == list(range(1, whole.progress.step + 1))


def test_missed_gate_stops_the_run_and_says_why(corpus: Corpus, tmp_path: Path) -> None:
    part = Part(32, 128, {"copy": 1.0}, copy_vocab=64, copy_smallest=64)
    stage = Stage("copy", (part,), {"copy": 0.99}, 128 * 4, least_steps=2)
    trainer = Trainer(tiny_plan((stage,)), corpus, tmp_path)
    with pytest.raises(GateError, match=r"stage 'copy' must reach .*0.99.* within 512 tokens"):
        trainer.run()
    assert trainer.progress.step == 4


def test_training_lowers_the_loss(corpus: Corpus, tmp_path: Path) -> None:
    part = Part(32, 256, {"text": 1.0})
    stage = Stage("text", (part,), {}, 256 * 40, fixed=True)
    trainer = Trainer(replace(tiny_plan((stage,)), rate=5e-3), corpus, tmp_path)
    trainer.run()
    assert trainer.progress.loss < np.log(512) - 1


def test_rate_follows_tokens_only() -> None:
    polish = STAGES[-1]
    plan = Plan(STAGES)
    rates = [
        learning_rate(plan, polish, Progress(stage_tokens=int(share * polish.limit), step=5000))
        for share in (0.0, 0.3, 0.65, 1.0)
    ]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 2e-5], rel=1e-3)
    assert learning_rate(plan, STAGES[0], Progress(step=49)) == pytest.approx(5e-4)


def test_spread_rows_redraws_unseen_rows_like_the_used_ones() -> None:
    gen = torch.Generator().manual_seed(0)
    table = torch.randn(400, 16, generator=gen) * 0.1 + 3.0
    used = torch.arange(0, 400, 2)
    table[used] = torch.randn(200, 16, generator=gen) + torch.linspace(-2, 2, 16)
    before = table[used].clone()
    spread_rows(table, used, seed=1)
    fresh = table[1::2]
    assert torch.equal(table[used], before)
    assert torch.allclose(fresh.mean(0), before.mean(0), atol=0.4)
    assert torch.allclose(fresh.std(0), before.std(0), atol=0.3)


def test_copy_alphabet_grows_by_taking_tokens_in() -> None:
    assert sorted(copy_order(64)) == list(range(64))
    assert copy_order(64).tolist() == copy_order(64).tolist()


def test_batch_mixes_follow_the_parts(corpus: Corpus) -> None:
    batches = StageBatches(corpus, two_stages()[1], 1, seed=0)
    batch: Batch = batches[0]
    assert batch.ids.shape == (4, 65)
    assert batches[1].ids.shape == (8, 33)


def test_exported_checkpoint_is_the_trained_network(
    corpus: Corpus, tok: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = tiny_plan(two_stages())
    trainer = Trainer(plan, corpus, tmp_path)
    checkpoint.export(trainer.net, tok, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = trainer.net.bfloat16().float()
        expected = ours.logits(ours.hidden(ids))
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    fast = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (fast.eos_token, fast.pad_token, fast.bos_token) == ("<|end|>", "<|endoftext|>", None)
    assert model.generation_config.eos_token_id == [4, 0]
