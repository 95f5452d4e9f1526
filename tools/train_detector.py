"""Train the detector's scorer: `python -m tools.train_detector`; weights, scores and a plot.

Seeded: the same machine and catalogues give the same weights. The held-out world is not read here
but to keep its values out of the training world.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from kvkeep.sharing.detector import scorer
from kvkeep.sharing.detector.catalogue import shipped_rules
from kvkeep.sharing.detector.features import BITS, FEATURES, GRAMS, INNER, Lexicon, tokenise
from kvkeep.sharing.detector.rules import RuleRecogniser
from kvkeep.sharing.detector.spans import Span, Verdict
from tools.detector_data import training, validation
from tools.detector_data.calibration import Judged, calibrate, plot
from tools.detector_data.dataset import PROMPT, PROSE, Sizes, passages, prompt_parts
from tools.detector_data.lexicon import lexicon
from tools.detector_data.lists import SEED
from tools.detector_data.passages import KINDS, Passage
from tools.detector_data.prose import Prose, Sources, read

ROOT: Final = Path(__file__).resolve().parents[1]
WEIGHTS: Final = ROOT / "src" / "kvkeep" / "sharing" / "detector" / "scorer.npz"
FIGURE: Final = ROOT / "docs" / "figures" / "detector-reliability.svg"
EMBEDDING: Final = 36
HIDDEN: Final = 64
SILENT: Final = frozenset(
    kind.kind for slot, kind in KINDS.items() if not kind.free_text and slot != "password"
)
"""Kinds with a form: learned, so that they are not taken for others, and left to the rules."""
GAP: Final = max(scorer.NEAR) + max(scorer.WIDE)
"""Empty tokens between passages of a batch."""
DROPPED: Final = 0.45
"""Share of tokens whose longer features are hidden in training: unseen values look like that."""
UNKNOWN: Final = 0.2
"""Share of tokens hidden altogether: unseen wording looks like that."""
UNKNOWN_VALUES: Final = 0.12
"""Share of values hidden as a whole: an unseen value looks like that, and the context is left."""
UNLISTED: Final = 0.3
"""Share of tokens that the lexicon is made not to know."""
UNRULED: Final = 0.25
"""Share of values, and of stretches between, whose rules are made to find nothing."""
FORMS: Final = 2 * len(GRAMS) + INNER
"""The columns after n-grams: shape, word, pair, two of the lexicon, the rules'."""
WORD_COLUMNS: Final = (4, 5, 6, 7, FORMS + 1, FORMS + 2)
LEXICON_COLUMNS: Final = (FORMS + 3, FORMS + 4)


class Example(NamedTuple):
    """A passage as the model sees it."""

    features: npt.NDArray[np.int32]
    classes: npt.NDArray[np.int64]


def encode(
    passage: Passage, classes: Mapping[str, int], known: Lexicon | None, hints: scorer.Hints
) -> Example:
    """Return a passage's tokens with their classes."""
    tokens = tokenise(passage.text, known, hints.of(passage.text))
    target = np.zeros(len(tokens.starts), np.int64)
    for label in passage.labels:
        inside = (tokens.starts < label.end) & (tokens.ends > label.start)
        target[inside] = classes[label.kind]
    return Example(tokens.features, target)


class Tagger(nn.Module):
    """The scorer's arithmetic, in torch."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(
            2**BITS, EMBEDDING, mode="sum", padding_idx=0, include_last_offset=False
        )
        nn.init.normal_(self.table.weight, std=0.05)
        with torch.no_grad():
            self.table.weight[0] = 0  # a feature that is not there adds nothing
        self.near = nn.Linear(EMBEDDING * len(scorer.NEAR), HIDDEN)
        self.wide = nn.Linear(HIDDEN * len(scorer.WIDE), HIDDEN)
        self.out = nn.Linear(HIDDEN, classes)

    @staticmethod
    def shifted(rows: torch.Tensor, offsets: Sequence[int]) -> torch.Tensor:
        """Return each row beside its neighbours, zeros beyond the edges."""
        reach, count = max(offsets), len(rows)
        padded = F.pad(rows, (0, 0, reach, reach))
        return torch.cat([padded[reach + at : reach + at + count] for at in offsets], dim=1)

    def forward(self, rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return logits `[T, classes]`; `real [T, 1]` is 0 for the gaps between passages."""
        embedded = F.dropout(self.table(rows), 0.2, self.training)
        near = F.relu(self.near(self.shifted(embedded, scorer.NEAR))) * real
        near = F.dropout(near, 0.1, self.training)
        wide = F.relu(self.wide(self.shifted(near, scorer.WIDE)))
        logits: torch.Tensor = self.out(F.dropout(wide, 0.1, self.training))
        return logits


def batches(
    examples: Sequence[Example], tokens: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield features and classes of about `tokens` tokens, gaps marked by class -1."""
    gap = Example(np.zeros((GAP, FEATURES), np.int32), np.full(GAP, -1, np.int64))
    group: list[Example] = []
    size = 0
    for index in rng.permutation(len(examples)):
        group += [examples[index], gap]
        size += len(examples[index].classes)
        if size >= tokens:
            yield _stacked(group)
            group, size = [], 0
    if group:
        yield _stacked(group)


def _stacked(group: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch as tensors."""
    rows = torch.from_numpy(np.concatenate([example.features for example in group]))
    return rows, torch.from_numpy(np.concatenate([example.classes for example in group]))


def thinned(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return features `[T, FEATURES]` of classes `[T]` with some hidden, as unseen text has."""
    kept = rows.clone()
    for columns, share in ((WORD_COLUMNS, DROPPED), (LEXICON_COLUMNS, UNLISTED)):
        hidden, at = torch.rand(len(rows), 1) < share, torch.tensor(columns)
        kept[:, at] = rows[:, at].masked_fill(hidden, 0)
    value = torch.cumsum(torch.diff(target, prepend=target[:1]) != 0, 0)
    kept[torch.rand(len(target))[value] < UNRULED, FEATURES - 1] = 0
    whole = (torch.rand(len(target))[value] < UNKNOWN_VALUES) & (target > 0)
    kept[whole | (torch.rand(len(target)) < UNKNOWN)] = 0
    return kept


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train."""

    epochs: int
    batch_tokens: int = 6_000
    rate: float = 4e-3


def train(examples: Sequence[Example], classes: int, plan: Plan, seed: int) -> Tagger:
    """Return a trained tagger."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    model = Tagger(classes)
    total = sum(len(example.classes) for example in examples)
    steps = plan.epochs * (total // plan.batch_tokens + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=steps + 1)
    for epoch in range(plan.epochs):
        begun, losses = time.perf_counter(), []
        for rows, target in batches(examples, plan.batch_tokens, rng):
            logits = model(thinned(rows, target), (target >= 0).float()[:, None])
            loss = F.cross_entropy(logits, target, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        took = time.perf_counter() - begun
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}, {took:.0f} s", flush=True)
    return model.eval()


def arrays_of(model: Tagger, known: Lexicon) -> dict[str, npt.NDArray[Any]]:
    """Return the weights as they are stored: the table in 8 bits, one scale per column."""
    table = model.table.weight.detach().numpy()
    scale = np.maximum(np.abs(table).max(axis=0) / 127, 1e-8).astype(np.float32)
    stored: dict[str, npt.NDArray[Any]] = {
        "table": np.clip(np.rint(table / scale), -127, 127).astype(np.int8),
        "table_scale": scale,
        "lexicon": known.bits,
    }
    for name in ("near", "wide", "out"):
        layer = getattr(model, name)
        stored[name] = layer.weight.detach().numpy().T.astype(np.float16)
        stored[f"{name}_bias"] = layer.bias.detach().numpy().astype(np.float32)
    return stored


def save(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, object]
) -> scorer.Weights:
    """Write weights and read them back."""
    head = dict(meta) | {
        "version": scorer.VERSION,
        "bits": BITS,
        "features": FEATURES,
    }
    head["digest"] = scorer.digest_of(arrays, head)
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = np.frombuffer(json.dumps(head, sort_keys=True).encode(), np.uint8)
    np.savez_compressed(path, allow_pickle=False, meta=packed, **arrays)
    return scorer.load_weights(path)


def judged(
    weights: scorer.Weights, rules: RuleRecogniser, examples: Sequence[Passage]
) -> list[Judged]:
    """Return each passage's largest log odds of each kind, the kinds it holds, what rules say."""
    tagger = scorer.LearnedScorer(rules, weights)
    return [_judged(tagger, rules.spans(passage.text), passage) for passage in examples]


def _judged(tagger: scorer.LearnedScorer, found: Sequence[Span], passage: Passage) -> Judged:
    """Return one passage's outcome, given what the rules found."""
    tokens = tagger.tokens(passage.text, tagger.hints.beside(passage.text, found))
    odds = tagger.without_fillers(passage.text, tokens, tagger.odds(tokens))
    return Judged(
        tuple(odds.max(axis=0, initial=-30.0).tolist()),
        frozenset(label.kind for label in passage.labels),
        passage.target == PROSE,
        any(span.verdict is not Verdict.CLEAR for span in found),
        passage.target == PROMPT,
    )


def kept(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, object]]:
    """Return stored weights and what is told of them, the bounds left out."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    meta = json.loads(bytes(arrays.pop("meta")))
    told = {name: meta[name] for name in ("kinds", "prose", "passages", "tokens")}
    return arrays, told


def flat(kinds: int) -> dict[str, list[float]]:
    """Return a calibration that changes nothing."""
    return {"slopes": [1.0] * kinds, "offsets": [0.0] * kinds}


def trained(
    prose: Prose,
    kinds: Sequence[tuple[str, str]],
    rules: RuleRecogniser,
    epochs: int,
    scale: float,
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, object]]:
    """Return new weights and what is told of them."""
    begun = time.perf_counter()
    classes = {kind: 1 + at for at, (kind, _) in enumerate(kinds)}
    sizes = Sizes(int(330 * scale), int(2200 * scale), 1_000_000)
    known = list(passages(training.world(), prose.seen, sizes, SEED))
    names, hints = lexicon(), scorer.Hints(rules)
    examples = [encode(passage, classes, names, hints) for passage in known]
    tokens = sum(len(example.classes) for example in examples)
    print(
        f"{len(known)} passages, {tokens} tokens, {time.perf_counter() - begun:.0f} s", flush=True
    )
    model = train(examples, 1 + len(kinds), Plan(epochs), SEED)
    meta = {"kinds": kinds, "prose": prose.digest, "passages": len(known), "tokens": tokens}
    return arrays_of(model, names), meta


def main() -> int:
    """Train, calibrate, store, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--locales", type=Path, default=Path("/usr/share/locale"))
    parser.add_argument("--manuals", type=Path, default=Path("/usr/share/man"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of passages")
    parser.add_argument("--keep", type=Path, help="fit bounds to these weights, train none")
    given = parser.parse_args()
    begun = time.perf_counter()
    sources = Sources(given.locales, given.manuals, Path(np.__file__).parents[1])
    prose = read(sources, count=int(1200 * given.scale))
    rules = RuleRecogniser(shipped_rules())
    kinds = list(dict.fromkeys((kind.kind, kind.category) for kind in KINDS.values()))
    if given.keep:
        arrays, meta = kept(given.keep)
    else:
        arrays, meta = trained(prose, kinds, rules, given.epochs, given.scale)
    raw = save(given.out, arrays, meta | flat(len(kinds)))
    held = Sizes(100, 600, 1_000_000)
    plain = list(passages(validation.world(), prose.unseen, held, SEED + 1))
    found = judged(raw, rules, [*plain, *prompt_parts(validation.PROMPTS)])
    fit = calibrate(found, [kind for kind, _ in kinds], SILENT)
    save(given.out, arrays, meta | {"slopes": fit.slopes, "offsets": fit.offsets})
    plot(found, fit, given.figure)
    print(fit.report(found), f"\n{time.perf_counter() - begun:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
