"""Trains the demo model: `python tools/train_demo.py --out DIR`; run again, it goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo_model import checkpoint, tokenizer
from demo_model.samples import Corpus
from demo_model.stages import STAGES
from demo_model.train import Plan, Trainer
from tokenizers import Tokenizer


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


def main() -> None:
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
    trainer.run()
    checkpoint.export(trainer.net, tok, args.out / "model")


if __name__ == "__main__":
    main()
