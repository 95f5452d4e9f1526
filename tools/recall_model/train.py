"""The training of a recall model: copying first, then recall over longer and longer rows.

Recall needs a layer that carries each token to the next place and one that looks for it there. The
first comes about by chance, late; so while copying is learnt, layer 0's attention is also asked
which token stood before, through a readout that is thrown away. A batch follows
from the plan's seed and the step's number, so a run that was interrupted goes on as if it had not.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tools.demo_model.model import Layer, Llama, Shape
from tools.recall_model import data

RECALL: Final = ("pairs", "spans", "shots")
GATE: Final = 0.98
"""What a finished model must reach in each kind, over its longest rows."""
GATE_ROWS: Final = 128


class GateError(RuntimeError):
    """A stage or the finished model misses its gate."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Rows of some kinds in turn, until all of them are answered well enough."""

    kinds: tuple[str, ...]
    tokens: int
    gate: float
    limit: int
    """Steps."""
    step_tokens: int = 4096
    fixed: bool = False
    """Runs to its limit while the rate falls to a twentieth."""
    least: int = 30
    """Steps, however good the answers are."""
    hinted: bool = False
    """Layer 0's attention is asked which token stood before."""


STAGES: Final = (
    Stage(("repeated",), 32, 0.75, 3000, 2048, hinted=True, least=1201),
    Stage(("repeated",), 64, 0.75, 1500, 2048, hinted=True),
    Stage(RECALL, 64, 0.95, 2000, 2048),
    Stage(RECALL, 128, 0.95, 1000),
    Stage(RECALL, 256, 0.95, 1000),
    Stage(RECALL, 512, 0.96, 1000),
    Stage(RECALL, 1024, 0.91, 1000, least=276),
    Stage(RECALL, 1024, 0.95, 200, fixed=True),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of; two runs with equal plans take the same steps."""

    shape: Shape
    stages: tuple[Stage, ...] = STAGES
    seed: int = 0
    rate: float = 4e-3


@dataclass(slots=True)
class Progress:
    """Where a run is: the next step is number `index` of stage `stage`."""

    stage: int = 0
    index: int = 0
    step: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    """Of each kind, about the mean of its last twenty steps."""


def shape(width: int, theta: float, positions: int) -> Shape:
    """Return two layers of four query heads and two KV heads of 32."""
    return Shape(data.VOCAB, width, 2, 4, 2, 2 * width, 32, theta, positions=positions)


class Recaller(Llama):
    """The network with a head of its own: a tied one begins by repeating each token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and "lm_head" not in name:
                scale = 1.0 if "embed" in name else 0.7
                nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def carried(self, ids: Tensor) -> Tensor:
        """Return what layer 0's attention adds [B, T, hidden]."""
        d = self.shape.head_dim
        inverse = self.shape.rope_theta ** (-torch.arange(0, d, 2).float() / d)
        angle = torch.arange(ids.shape[1]).float()[:, None] * inverse[None]
        layer = next(iter(self.model.layers))
        assert isinstance(layer, Layer)
        normed = layer.input_layernorm(self.model.embed_tokens(ids))
        found: Tensor = layer.self_attn(normed, angle.cos(), angle.sin())
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        found: Tensor = self.lm_head(hidden)
        return found


class Trainer:
    """Network, optimiser and progress of one run, kept in `folder`."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        torch.manual_seed(plan.seed)
        self.net = Recaller(plan.shape)
        self.readout = nn.Linear(plan.shape.hidden, plan.shape.vocab, bias=False)
        weights = [*self.net.parameters(), *self.readout.parameters()]
        self.opt = torch.optim.AdamW(weights, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
        self.progress = Progress()
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            self.net.load_state_dict(state["net"])
            self.readout.load_state_dict(state["readout"])
            self.opt.load_state_dict(state["opt"])
            self.progress = Progress(**state["progress"])

    @property
    def state_file(self) -> Path:
        """Weights, optimiser and progress after the last save."""
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write the state; a crash leaves the old one or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.state_file.with_suffix(".new")
        state = {"net": self.net.state_dict(), "readout": self.readout.state_dict()}
        rest = {"opt": self.opt.state_dict(), "progress": asdict(self.progress)}
        torch.save({**state, **rest}, fresh)
        fresh.replace(self.state_file)

    def run(self, stop_at_step: int | None = None) -> bool:
        """Train to the end of the plan, or to a step; tell whether it ended. Raises GateError."""
        p = self.progress
        while p.stage < len(self.plan.stages):
            stage = self.plan.stages[p.stage]
            kind = stage.kinds[p.index % len(stage.kinds)]
            got = self.step(kind, stage)
            known = p.accuracy.get(kind, got)
            p.accuracy[kind] = 0.95 * known + 0.05 * got
            p.step, p.index = p.step + 1, p.index + 1
            passed = all(p.accuracy.get(k, 0.0) >= stage.gate for k in stage.kinds)
            over = p.index >= stage.limit
            if over and not passed:
                raise GateError(
                    f"stage {p.stage} reached {p.accuracy} in {stage.limit} steps, of"
                    f" {stage.gate}: try another --seed"
                )
            if over or (passed and not stage.fixed and p.index >= stage.least):
                self._log(stage)
                p.stage, p.index, p.accuracy = p.stage + 1, 0, {}
                self.save()
            elif p.step % 100 == 0:
                self._log(stage)
                self.save()
            if p.step == stop_at_step:
                self.save()
                return p.stage == len(self.plan.stages)
        return True

    def step(self, kind: str, stage: Stage) -> float:
        """Take one step on a batch; return the share of right answers in it."""
        p = self.progress
        rate = self.plan.rate * min(1.0, (p.step + 1) / 100)
        if stage.fixed:
            rate *= 0.3 * max(0.05, 1 - p.index / stage.limit)
        elif stage.tokens >= 512 and p.index > 300:
            rate *= 0.3
        for group in self.opt.param_groups:
            group["lr"] = rate
        gen = Generator().manual_seed((self.plan.seed << 32) + p.step)
        batch = data.drawn(gen, kind, max(1, stage.step_tokens // stage.tokens), stage.tokens)
        asked = batch.labels != data.NOTHING
        logits = self.net.logits(self.net.hidden(batch.ids)[asked])
        loss = F.cross_entropy(logits, batch.labels[asked])
        if stage.hinted:
            before = self.readout(self.net.carried(batch.ids))[:, 1:]
            loss = loss + 0.5 * F.cross_entropy(before.flatten(0, 1), batch.ids[:, :-1].flatten())
        self.opt.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.opt.step()
        return right(logits, batch.labels[asked])

    def _log(self, stage: Stage) -> None:
        p = self.progress
        found = {kind: round(value, 4) for kind, value in p.accuracy.items()}
        line = json.dumps({"step": p.step, "stage": p.stage, "tokens": stage.tokens, **found})
        print(line, flush=True)


def right(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right answers."""
    return float((logits.argmax(-1) == labels).float().mean())


@torch.inference_mode()
def scores(net: Recaller, tokens: int, seed: int) -> dict[str, float]:
    """Return the share of right answers of each kind over rows that no training step has seen."""
    found = {}
    for kind in RECALL:
        gen = Generator().manual_seed(-1 - seed)
        batches = [data.drawn(gen, kind, 8, tokens) for _ in range(GATE_ROWS // 8)]
        asked = [batch.labels != data.NOTHING for batch in batches]
        logits = [net.logits(net.hidden(b.ids)[a]) for b, a in zip(batches, asked, strict=True)]
        labels = [b.labels[a] for b, a in zip(batches, asked, strict=True)]
        found[kind] = right(torch.cat(logits), torch.cat(labels))
    return found
