"""One training run, from the text to the scored checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tools.demo_model import card, checkpoint, evaluate, tokenizer
from tools.demo_model.samples import Corpus
from tools.demo_model.stages import STAGES
from tools.demo_model.train import GateError, Plan, Trainer


def prepare(folder: Path, seed: int) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and text of this run, made on its first start."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, text = folder / "tokenizer.json", folder / "corpus.txt"
    if not vocabulary.exists():
        texts = tokenizer.corpus(seed)
        text.write_text("\x00".join(texts))
        tokenizer.build(texts, seed).save(str(vocabulary))
    tok = Tokenizer.from_file(str(vocabulary))
    return tok, Corpus(tok, text.read_text().split("\x00"))


def finish(trainer: Trainer, tok: Tokenizer, seed: int) -> None:
    """Export the trained network, score it and write its card. Raises GateError."""
    model = trainer.folder / "model"
    checkpoint.export(trainer.net, tok, model)
    scores = evaluate.evaluate(model, trainer.corpus)
    scores.write(trainer.folder / "scores.json")
    card.write_trials(model, trainer.corpus)
    card.write(model, scores, seed, trainer.progress.tokens)
    if scores.missed():
        wanted = f"{evaluate.GATE:.0%} at {evaluate.GATE_LENGTH:,} tokens"
        raise GateError(f"the model must reach {wanted}: {', '.join(scores.missed())}")


def main() -> None:
    """Train all stages, then export and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="no C++ compiler needed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tok, corpus = prepare(args.out, args.seed)
    plan = Plan(STAGES, seed=args.seed, compiled=not args.no_compile)
    trainer = Trainer(plan, corpus, args.out)
    try:
        trainer.run()
        finish(trainer, tok, args.seed)
    except GateError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
