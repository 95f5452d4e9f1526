"""The training loop: stages with gates, a state to resume from, a log of JSON lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from tools.demo_model import data
from tools.demo_model.model import Llama, Shape, spread_rows
from tools.demo_model.samples import Batch, Corpus, StageBatches, copy_order
from tools.demo_model.stages import KINDS, Stage


class GateError(RuntimeError):
    """A stage used up its tokens without reaching its gate."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of; two runs with equal plans take the same steps."""

    stages: tuple[Stage, ...]
    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    rate: float = 1e-3
    warm_up: int = 100
    compiled: bool = True
    save_every: int = 100
    log_every: int = 20
    workers: int = 1


@dataclass(slots=True)
class Progress:
    """Where a run is: the next batch is number `index` of stage `stage`."""

    stage: int = 0
    index: int = 0
    stage_tokens: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)


class StepResult(NamedTuple):
    """Loss of a step and the share of right tokens of each kind in its batch."""

    loss: float
    accuracy: dict[str, float]


def smoothed(old: float | None, new: float) -> float:
    """Running mean over about twenty steps."""
    return new if old is None else 0.95 * old + 0.05 * new


def learning_rate(plan: Plan, stage: Stage, progress: Progress) -> float:
    """Warm-up, constant, and in a fixed stage a linear decay over its last seven tenths."""
    rate: float = plan.rate * min(1.0, (progress.step + 1) / plan.warm_up)
    if not stage.fixed:
        return rate
    left = 1 - progress.stage_tokens / stage.limit
    return rate * max(0.02, min(1.0, left / 0.7))


class Trainer:
    """Network, optimiser and progress of one run, kept in `folder`."""

    def __init__(self, plan: Plan, corpus: Corpus, folder: Path) -> None:
        self.plan, self.corpus, self.folder = plan, corpus, folder
        torch.manual_seed(plan.seed)
        self.net = Llama(plan.shape)
        self.hidden: Callable[[Tensor], Tensor] = self.net.hidden
        if plan.compiled:
            self.hidden = torch.compile(self.net.hidden, dynamic=False)
        weights = list(self.net.parameters())
        groups = [
            {"params": [w for w in weights if w.dim() == 2], "weight_decay": 0.05},
            {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
        ]
        self.opt = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), fused=True)
        self.progress = Progress()
        if self.state_file.exists():
            self._load()

    @property
    def state_file(self) -> Path:
        """Weights, optimiser and progress after the last save."""
        return self.folder / "state.pt"

    @property
    def log_file(self) -> Path:
        """One JSON object per `log_every` steps."""
        return self.folder / "train.jsonl"

    def save(self) -> None:
        """Write the state; a crash leaves the old one or the new one."""
        fresh = self.state_file.with_suffix(".new")
        torch.save(
            {
                "net": self.net.state_dict(),
                "opt": self.opt.state_dict(),
                "rng": torch.get_rng_state(),
                "progress": asdict(self.progress),
            },
            fresh,
        )
        fresh.replace(self.state_file)

    def _load(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.opt.load_state_dict(state["opt"])
        torch.set_rng_state(state["rng"])
        self.progress = Progress(**state["progress"])
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.progress.step]
        self.log_file.write_text("".join(line + "\n" for line in kept))

    def run(self, stop_at_step: int | None = None) -> None:
        """Train to the end of the plan, or to a step. Raises GateError."""
        for number in range(self.progress.stage, len(self.plan.stages)):
            self._enter(number)
            if not self._run_stage(self.plan.stages[number], stop_at_step):
                return
            self.progress.stage, self.progress.index = number + 1, 0
            self.progress.stage_tokens, self.progress.accuracy = 0, {}
            self.save()

    def _enter(self, number: int) -> None:
        """Make the tokens usable that copying takes in with this stage."""
        if not number or self.progress.index:
            return
        old = self.plan.stages[number - 1].parts[0].copy_vocab
        if self.plan.stages[number].parts[0].copy_vocab > old:
            used = torch.from_numpy(copy_order(self.plan.shape.vocab)[:old])
            spread_rows(self.net.model.embed_tokens.weight.data, used, self.plan.seed)

    def _batches(self, stage: Stage) -> Iterator[Batch]:
        made = StageBatches(self.corpus, stage, self.progress.stage, self.plan.seed)
        longest = stage.limit // min(p.tokens for p in stage.parts) + 2
        loader: DataLoader[Batch] = DataLoader(
            made,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(self.progress.index, max(longest, stage.least_steps + 1)),
            num_workers=self.plan.workers,
            prefetch_factor=4 if self.plan.workers else None,
            worker_init_fn=be_nice if self.plan.workers else None,
        )
        return iter(loader)

    def _run_stage(self, stage: Stage, stop_at_step: int | None) -> bool:
        """Whether the stage ended, rather than the run was stopped."""
        p, start = self.progress, time.monotonic() - self.progress.seconds
        for batch in self._batches(stage):
            rate = learning_rate(self.plan, stage, p)
            result = self.step(batch, rate)
            for kind, accuracy in result.accuracy.items():
                p.accuracy[kind] = smoothed(p.accuracy.get(kind), accuracy)
            p.loss = smoothed(p.loss if p.index else None, result.loss)
            size = batch.weights[:, 1:].numel()
            p.step, p.index = p.step + 1, p.index + 1
            p.tokens, p.stage_tokens = p.tokens + size, p.stage_tokens + size
            p.seconds = time.monotonic() - start
            passed = all(p.accuracy.get(k, 0.0) >= v for k, v in stage.gate.items())
            over = p.stage_tokens >= stage.limit
            early = passed and not stage.fixed and p.index >= stage.least_steps
            if p.step % self.plan.log_every == 0 or early or over:
                self._log(stage, rate)
            if over and not passed:
                raise GateError(self._missed(stage))
            if early or over:
                return True
            if p.step % self.plan.save_every == 0 or p.step == stop_at_step:
                self.save()
            if p.step == stop_at_step:
                return False
        raise GateError(self._missed(stage))

    def _missed(self, stage: Stage) -> str:
        reached = {k: round(self.progress.accuracy.get(k, 0.0), 3) for k in stage.gate}
        return (
            f"stage {stage.name!r} must reach {stage.gate} within {stage.limit:,} tokens and "
            f"reached {reached}: see {self.log_file}, try another --seed or raise its limit"
        )

    def _log(self, stage: Stage, rate: float) -> None:
        p = self.progress
        line = {
            "stage": stage.name,
            "step": p.step,
            "mtok": round(p.tokens / 1e6, 3),
            "s": round(p.seconds),
            "rate": round(rate, 6),
            "loss": round(p.loss, 3),
            **{k: round(v, 4) for k, v in p.accuracy.items()},
        }
        with self.log_file.open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def step(self, batch: Batch, rate: float) -> StepResult:
        """One optimiser step on a batch."""
        for group in self.opt.param_groups:
            group["lr"] = rate
        target, weight = batch.ids[:, 1:], batch.weights[:, 1:]
        rows = weight > 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.net.logits(self.hidden(batch.ids[:, :-1])[rows])
        losses = F.cross_entropy(logits.float(), target[rows], reduction="none")
        loss = (losses * weight[rows]).sum() / weight[rows].sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.opt.step()
        self.opt.zero_grad()
        right = torch.zeros_like(weight)
        right[rows] = (logits.argmax(-1) == target[rows]).float()
        accuracy: dict[str, float] = {}
        for i, kind in enumerate(KINDS):
            scored = rows if kind in ("copy", "text") else weight == data.ANSWER
            mine = (batch.kinds == i)[:, None] & scored
            if mine.any():
                accuracy[kind] = right[mine].mean().item()
        return StepResult(loss.item(), accuracy)


def be_nice(_worker: int) -> None:
    """Let the making of batches yield to the training."""
    os.nice(5)
