"""One training run, to a checkpoint beside what it reached."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tools.demo_model.checkpoint import config
from tools.recall_model.train import (
    GATE,
    STAGES,
    GateError,
    Plan,
    Recaller,
    Trainer,
    scores,
    shape,
)


def export(net: Recaller, folder: Path) -> None:
    """Write config and weights; the language is ids, so there is no tokenizer."""
    settings = config(net.shape)
    settings.eos_token_id = settings.pad_token_id = None
    settings.tie_word_embeddings = False
    model = LlamaForCausalLM(settings)
    model.load_state_dict(net.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone


def finish(trainer: Trainer, out: Path) -> None:
    """Export the network as it is stored and write what it reaches. Raises GateError."""
    net, longest = trainer.net, STAGES[-1].tokens
    net.to(torch.bfloat16).float()
    found = scores(net, longest, trainer.plan.seed)
    export(net, out)
    card = {"seed": trainer.plan.seed, "steps": trainer.progress.step, "tokens": longest}
    text = json.dumps({**card, "right": found}, indent=2)
    (out / "scores.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    if min(found.values()) < GATE:
        raise GateError(f"the model must reach {GATE:.0%} in each kind: try another --seed")


def main() -> None:
    """Train, then export and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, help="folder of the run's state; OUT/run if none")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--theta", type=float, default=10_000.0, help="RoPE's base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-at-step", type=int, help="end there; run again, it goes on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(shape(args.width, args.theta, 4096), seed=args.seed)
    trainer = Trainer(plan, args.work or args.out / "run")
    try:
        if trainer.run(args.stop_at_step):
            finish(trainer, args.out)
    except GateError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
